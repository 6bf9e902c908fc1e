"""`octavo bench`: a serving benchmark for any OpenAI-compatible server, this one's native dialect, or the engine alone.

Runs in one process on one thread. `command` owns the flags and the order of things, `work` what is asked, `client` and
`dialects` the wire, `drive` and `in_process` the clock, `figures` the arithmetic, `show` what people see.
"""

from octavo.cli.bench.command import add_arguments, run

__all__ = ["add_arguments", "run"]
