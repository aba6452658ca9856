"""lowbit: language models in few bits.

The parts are the folders beside this one: quant is imported as lowbit.quant, engine as lowbit.engine.
"""

__version__ = "0.1.0"
