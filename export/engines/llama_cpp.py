"""Rules of llama.cpp, from its `ggml-cpu` and `ggml-cuda` (`supports_op`): every block type that lowbit writes has a
kernel on each kind of machine. Both round inputs to 8 bits in blocks of their own, whatever a file says.

Files of every type were loaded on a CPU (tests/golden/test_llama.py); GPUs are by its source alone.
"""

from lowbit.export.engines.engine import Engine, EngineKernel, on_cpu, on_gpu

LLAMA_CPP = Engine(
    "llama.cpp",
    "ggml 0.25.3",
    (EngineKernel("ggml-cuda", on_gpu(50)), EngineKernel("ggml-cpu", on_cpu)),
    files=("*.gguf",),
)
