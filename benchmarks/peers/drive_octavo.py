"""Octavo's own engine, as its server loads and drives it. FOLDER is the compressed-tensors checkpoint."""

from __future__ import annotations

import gc
import time

from protocol import SteppedPeer, main


class Octavo(SteppedPeer):
    def __init__(self, folder: str, threads: int) -> None:
        super().__init__()
        from octavo.settings import set_thread_environ, with_overrides

        settings = with_overrides(
            {
                "model_dir": folder,
                "max_seq_len": 4096,
                "max_dec_len": 1024,
                "batch_size": 32,
                "block_bs": 16.0,
                "num_threads": threads,
                "prefix_cache": False,
            }
        )
        set_thread_environ(settings)
        from octavo.engine.core import EngineCore, scheduler_for
        from octavo.engine.load import load_runner

        runner = load_runner(settings, lambda stage, fraction: None)
        self._core = EngineCore(scheduler_for(settings, runner.info), runner, time.monotonic)
        self._next = 0
        self.engine = self
        gc.collect()
        gc.freeze()  # as the engine's process does

    def add(self, prompt: list[int], output: int) -> int:
        from octavo.protocol.messages import SamplingParams, Submit

        self._next += 1
        self._core.add(Submit(self._next, prompt, SamplingParams(max_tokens=output, temperature=0.0, seed=1)))
        return self._next

    def step(self) -> list[tuple[int, int, bool]]:
        outputs = self._core.turn()
        return [(one.seq_id, len(one.token_ids), one.finish_reason is not None) for one in outputs]

    def cancel(self, names: list[int]) -> None:
        self._core.abort(names)


if __name__ == "__main__":
    main(Octavo)
