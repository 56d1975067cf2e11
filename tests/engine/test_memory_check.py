"""What does not fit in a device's memory is refused, with what would."""

import jax
import pytest

from disagg_jax.deployment import InstanceSpec, KVMemory, Role
from disagg_jax.engine.memory_check import check_fits
from disagg_jax.engine.placed_model import PlacedModel
from sharding.mesh import make_mesh
from sharding.rules import RULES
from tests.engine.harness import FAMILIES, MODELS, make_config, random_params

RULE_TABLE = RULES["decode"]
BLOCKS = 16


def placed_bytes(config, spec, memory) -> int:
    """What the fullest device really holds."""
    meshes = [
        make_mesh(jax.devices()[i * spec.tp : (i + 1) * spec.tp])
        for i in range(spec.pp)
    ]
    model = PlacedModel(config, random_params(config), meshes, RULE_TABLE, memory)
    arrays = jax.tree.leaves([group.params for group in model.groups])
    arrays += jax.tree.leaves(model.new_cache())
    by_device = dict.fromkeys(jax.devices(), 0)
    for array in arrays:
        for shard in array.addressable_shards:
            by_device[shard.device] += shard.data.nbytes
    return max(by_device.values())


@pytest.mark.parametrize("tp, pp", [(1, 1), (2, 1), (1, 2), (2, 2)])
@pytest.mark.parametrize(
    "config", [MODELS["divided"], FAMILIES["opt"]], ids=lambda config: config.name
)
def test_the_limit_is_what_is_really_placed(config, tp, pp):
    """To the byte: a byte less is refused, and one block fewer would fit."""
    spec = InstanceSpec(role=Role.DECODE, tp=tp, pp=pp)
    memory = KVMemory(num_blocks=BLOCKS, block_tokens=4, max_context=64)
    needed = placed_bytes(config, spec, memory)
    check_fits(config, spec, memory, RULE_TABLE, needed)
    check_fits(config, spec, memory, RULE_TABLE, None)
    with pytest.raises(ValueError, match=f"{BLOCKS - 1} blocks would fit"):
        check_fits(config, spec, memory, RULE_TABLE, needed - 1)


def test_weights_alone_may_be_too_large():
    config = make_config("large", embed=1024, mlp=8192)
    spec = InstanceSpec(role=Role.DECODE)
    memory = KVMemory(num_blocks=BLOCKS, block_tokens=4, max_context=64)
    with pytest.raises(ValueError, match="large on 'decode:tp1'.* 0 blocks would fit"):
        check_fits(config, spec, memory, RULE_TABLE, 2**20)
