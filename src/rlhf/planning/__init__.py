"""`rlhf plan`: memory a GPU, the smallest configuration that fits, and hours, for each stage; from a config, without weights.

`shapes` knows how large a model is, `activations` and `memory` what a stage keeps of it on a GPU, `search` which configuration
is the smallest that fits and how it is launched, `table` shows it. All of it is arithmetic: torch is imported only for versions
and adapters, and for a model that is neither built in nor has a GPT-2 or OPT config.
"""
