"""Tasks: what a quantized network is measured on; one file each.

episodes: returns of a policy in an environment. environments: the environments themselves.
perplexity: of a language model on documents. generation: what it continues a prompt with.
"""
