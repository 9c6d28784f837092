"""quantkit: post-training quantization of trained policies, measured by return and priced in hardware.

    checkpoint -> quantize -> evaluate -> cost -> Pareto front -> verified ONNX

Importing this package imports nothing heavy; torch is loaded by the modules that need it.
"""

__version__ = "0.1.0"
