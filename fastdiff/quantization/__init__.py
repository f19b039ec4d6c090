"""How weights are stored and multiplied.

`W8A8` multiplies in 8 bits, `StoredWeights` keeps weights small in one of `formats.FORMATS`, `LayerPrecision` gives
each layer what `sensitivity` measured to be worth it; kernels and formats that torchao has are torchao's.
"""
