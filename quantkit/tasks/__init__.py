"""Tasks: what a quantized network is measured on; one file each.

episodes: returns of a policy in an environment. environments: the environments themselves. states: those that it
meets there. fidelity: outputs and actions against float ones. robustness: episodes that are made harder. accuracy: of
a network on labelled inputs. perplexity: of a language model on documents. reward: of its answers to problems.
generation: what it continues a prompt with.
"""
