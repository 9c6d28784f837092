"""hwmodel: what a quantized network costs on an FPGA.

The ground floor of the project: number formats, layer specifications, an integer
reference and a cost model. It needs only the standard library and numpy.
"""

__version__ = "0.1.0"
