"""Lists the commands by the question that each answers.

python -m experiments
"""

from __future__ import annotations

COMMANDS = {
    "see it work": {
        "generate": "generate text from my prompts, with the stages of each",
    },
    "compare systems": {
        "goodput_sweep": "find the goodput of every system on this machine",
        "compare_systems": "know who wins for my model, targets and traffic",
        "placement_search": "find the best deployment on given devices",
    },
    "study a system in simulation": {
        "simulate": "simulate my traffic on deployments, request by request",
        "interference": "see what each system does to its requests",
        "reproduce": "make a paper's figures and tables again",
    },
    "hold the simulator against the engine": {
        "calibrate": "measure the engine's steps, and fit a cost model to them",
        "accuracy": "know how far the simulator is from the engine",
    },
    "hold the simulator against real devices": {
        "hardware_accuracy": "know how far it is from engines on GPUs",
        "fit_engine": "fit the profile of an engine to measurements of it",
    },
    "know what the engine costs": {
        "stalls": "see what a prompt does to requests that are decoding",
        "two_meshes": "see prefill and decode on meshes of their own",
        "kv_transfer": "know how much of a KV transfer is seen",
        "overhead": "know what serving adds to the device's work",
        "performance": "hold steps of the engine against the device's bound",
        "on_device": "know all that only an accelerator can tell, borrowed for minutes",
        "compile_check": "know what its programs do on a TPU or GPU that is not here",
        "simulator_speed": "know how fast the simulator is",
    },
    "look into a run": {
        "one_request": "see the stages of one request in each system",
        "chrome_trace": "open a run in Perfetto",
        "compare_runs": "see how two runs differ, and what it did to goodput",
    },
    "prepare": {
        "machine": "know what this machine has, and what suits it",
        "train_tiny": "train the model of the main job",
        "convert_checkpoint": "make a checkpoint of somebody's weights",
        "check_documents": "check the commands, paths and links of documents",
    },
}


def listing() -> str:
    """Return the commands under their questions, one line each."""
    lines = ["I want to ...", ""]
    for question, commands in COMMANDS.items():
        lines += [question, *(f"  {c:18} {what}" for c, what in commands.items()), ""]
    return "\n".join([*lines, "python -m experiments.COMMAND --help says how."])


if __name__ == "__main__":
    print(listing())
