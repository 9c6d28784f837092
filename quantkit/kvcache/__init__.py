"""Runtime caches of keys and values for language models: each file offers `make(config, *, options...)`.

What it gives is a transformers `Cache` that `model.generate(past_key_values=...)` takes, with
`bytes_held()` and `room()`. A text such as `saq:levels=16-8-4,block=64` names one; see `quantkit.caches`.
"""
