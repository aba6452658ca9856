"""The dialects of quantized checkpoints, one line each, and the files that some keep beside config.json."""

from lowbit.export.awq import AWQ
from lowbit.export.compressed_tensors import COMPRESSED_TENSORS
from lowbit.export.gptq import GPTQ, GPTQ_V2

DIALECTS = (COMPRESSED_TENSORS, GPTQ, GPTQ_V2, AWQ)
# File name -> quant_method. Old tools wrote such a file alone, and no quantization_config into config.json.
SIDECARS = {fmt.sidecar: fmt.method for fmt in DIALECTS if fmt.sidecar}
