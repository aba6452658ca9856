"""The decode engine: loads a checkpoint, quantized or not, and generates at the speed of memory.

from lowbit import engine
model = engine.load("DIR", device="cpu")     # lowbit.engine.loader.load has all options
model.logits(ids)                            # (B, T, vocabulary) float32 for token ids (B, T)
model.generate(["Hello"])                    # a list of Completions, one per prompt
"""

if __name__ == "engine":
    raise ImportError("the import name is lowbit: write lowbit.engine instead of engine")

from lowbit.engine.loader import load

__all__ = ["load"]
