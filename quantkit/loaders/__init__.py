"""Readers of checkpoints: each loader file offers `sniff(path) -> bool` and `load(path, ...) -> Model`.

`sb3` reads Stable-Baselines3 agents (with `sb3_archive`, `sb3_actor`, `sb3_spaces`, `vecnormalize` and `zoo`
as its parts), `cleanrl` those of CleanRL's scripts, both with `chain`, `torch_module` any nn.Module that the caller's
own code builds, `hf` Hugging Face directories of language models. Nothing read from a checkpoint is ever executed.
"""
