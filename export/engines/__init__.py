"""Rules of the engines that run quantized checkpoints: one file per engine, with the version the rules were read
from."""
