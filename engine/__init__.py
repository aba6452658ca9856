"""The decode engine: load a checkpoint, quantized or not, and generate at the speed of memory.

import engine
model = engine.load("DIR", device="cpu")     # engine.loader.load says what else it takes
model.logits(ids)                            # (B, T, vocabulary) float32 for token ids (B, T)
model.generate(["Hello"])                    # a list of Completions, one a prompt
"""

from engine.loader import load

__all__ = ["load"]
