"""A checkpoint made by GPTQModel, for our reader to read.

    PYTHON quantize_gptqmodel.py MODEL OUT --format gptq|gptq_v2|awq [--bits 4] [--group-size 32] [--asym]

PYTHON has gptqmodel (7.7 was tried). Calibration is on random tokens: the weights need to be real, not good.
"""

import argparse

import torch
from gptqmodel import GPTQModel, QuantizeConfig
from gptqmodel.quantization import FORMAT, METHOD


def main() -> None:
    parser = argparse.ArgumentParser(description="quantize with GPTQModel")
    parser.add_argument("model")
    parser.add_argument("out")
    parser.add_argument("--format", choices=["gptq", "gptq_v2", "awq"], required=True)
    parser.add_argument("--bits", type=int, default=4)
    parser.add_argument("--group-size", type=int, default=32)
    parser.add_argument("--asym", action="store_true")
    parser.add_argument("--vocabulary", type=int, default=256)
    args = parser.parse_args()
    kind = {"method": METHOD.AWQ, "format": FORMAT.GEMM} if args.format == "awq" else {"format": args.format}
    config = QuantizeConfig(
        bits=args.bits, group_size=args.group_size, sym=not args.asym, desc_act=False, device="cpu", **kind
    )
    generator = torch.Generator().manual_seed(0)
    mask = torch.ones(1, 64, dtype=torch.long)
    samples = [
        {"input_ids": torch.randint(0, args.vocabulary, (1, 64), generator=generator), "attention_mask": mask}
        for _ in range(32)
    ]
    model = GPTQModel.load(args.model, config)
    model.quantize(samples, batch_size=1)
    model.save(args.out)


if __name__ == "__main__":
    main()
