"""How the questions are asked: flags, configs, run directories, plots."""
