"""Run by another Python, one with gptqmodel: makes a GPTQ checkpoint of 8 bits with that library.

`python gptqmodel_maker.py FLOAT OUT GROUP_SIZE DESC_ACT SYM`; calibration text is random tokens.
"""

from __future__ import annotations

import sys


def make(source: str, target: str, *, group_size: int, desc_act: bool, sym: bool) -> None:
    import torch
    from gptqmodel import GPTQModel, QuantizeConfig

    config = QuantizeConfig(bits=8, group_size=group_size, desc_act=desc_act, sym=sym, act_group_aware=False)
    model = GPTQModel.load(source, config, device="cpu")
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, model.model.config.vocab_size, (16, 64), generator=generator).tolist()
    model.quantize([{"input_ids": row, "attention_mask": [1] * len(row)} for row in ids], batch_size=1)
    model.save(target)


if __name__ == "__main__":
    folder, out, size, act_order, symmetric = sys.argv[1:]
    make(folder, out, group_size=int(size), desc_act=act_order == "1", sym=symmetric == "1")
