"""Transforms of a model, one file each.

A method is a module with

    CHANGES: frozenset[str]     of "float", "acts", "weights", "bias", "trained", "refined", "joints"
    apply(model, calib, *, options...) -> dict[str, float]     diagnostics

"float" rescales weights and biases and preserves the function, "acts" sets input quantizers, "weights" sets
quantized weights, "bias" changes biases. "trained" fits the quantized weights by gradient descent through the whole
network and, where an option says so, its other parameters. "refined" starts from a quantized model and changes all
of these together: weights, scales, input quantizers and, for a policy, the input stage. "joints" quantizes what is no
layer's input, and gives layers that read it its scale. Options are keyword-only
with defaults; they are the schema of `--step name:key=value`.
"""
