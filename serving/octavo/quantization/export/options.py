"""What a user asks of `octavo quantize`, as one value."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path

from octavo.quantization.export.recipe import Ingredients
from octavo.quantization.export.scheme_names import Scheme


@dataclass(frozen=True)
class Options:
    """model, out: folders. keep_float: per cent of the quantisable parameters."""

    model: Path
    out: Path
    scheme: Scheme
    calibration: str
    num_samples: int = 128
    max_tokens: int = 512
    seed: int = 0
    keep_float: float = 0.0
    smoothing: bool = True
    gptq: bool = True
    keys: bool = True
    clipping: bool = True
    act_order: bool = True
    cache_per_head: bool = False
    ablation: bool = True
    max_shard_bytes: int = 4 << 30

    @property
    def state(self) -> Path:
        """What an unfinished run leaves for the next one."""
        return self.out.with_name(self.out.name + ".partial")

    @property
    def compares_caches(self) -> bool:
        """Whether what is written is measured with a float cache too."""
        return self.ablation and self.scheme.eight_bit_cache

    def variants(self) -> list[Ingredients]:
        """What is made and measured side by side; the last one is what is written."""
        wanted = [("smoothing", self.smoothing), ("gptq", self.gptq)]
        wanted += [("keys", self.keys)] if self.scheme.eight_bit_cache else []
        wanted += [("clipping", self.clipping)] if self.scheme.static_inputs else []
        used = [name for name, is_on in wanted if is_on]
        steps = [used[:count] for count in range(len(used) + 1)] if self.ablation else [used]
        return [
            Ingredients(
                name=f"+ {step[-1]}" if step else "plain",
                smoothing="smoothing" in step,
                gptq="gptq" in step,
                keys="keys" in step,
                clipping="clipping" in step,
                act_order=self.act_order,
                cache_per_head=self.cache_per_head,
            )
            for step in steps
        ]

    def to_json(self) -> dict[str, object]:
        values = asdict(self)
        return {**values, "model": str(self.model), "out": str(self.out), "scheme": self.scheme.name}
