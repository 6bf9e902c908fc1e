"""`octavo chat`: a terminal chat on top of the client library. Ctrl-C cancels the answer, not the program."""

from __future__ import annotations

import argparse
import time
from dataclasses import dataclass

from rich.console import Console
from rich.live import Live
from rich.markdown import Markdown

from octavo_client import ChatHistory, Client, OctavoError, Options, TransportLost

HELP = "/new starts over · /undo takes the last turn back · /seed N fixes the seed (/seed off) · /exit or Ctrl-D leaves"


@dataclass
class Session:
    """What one terminal holds: the conversation, the options, the console."""

    client: Client
    history: ChatHistory
    options: Options
    console: Console
    plain: bool = False

    def answer(self, question: str) -> None:
        """Ask, show the answer as it comes, keep what was said. An answer cut by Ctrl-C stays in the history."""
        self.history.user(question)
        text, started, first, count = "", time.monotonic(), 0.0, 0
        deltas = self.client.stream(self.history, options=self.options)
        try:
            with Live(console=self.console, refresh_per_second=12, vertical_overflow="visible") as live:
                for delta in deltas:
                    first = first or time.monotonic() - started
                    text += delta.text
                    count += len(delta.token_ids)
                    live.update(text if self.plain else Markdown(text))
        except KeyboardInterrupt:
            self.console.print("[dim](cancelled)[/dim]")
        except (OctavoError, TransportLost) as error:
            self.console.print(f"[red]{error}[/red]", highlight=False)
        finally:
            deltas.close()  # cancels what is not finished
        if not text:
            self.history.undo()
            return
        self.history.assistant(text)
        seconds = max(time.monotonic() - started, 1e-9)
        self.console.print(f"[dim]{count} tokens, first after {first * 1000:.0f} ms, {count / seconds:.1f} tok/s[/dim]")

    def command(self, line: str) -> bool:
        """Run a /command; False to leave."""
        word, _, rest = line.partition(" ")
        if word in ("/exit", "/quit"):
            return False
        if word == "/new":
            self.history.clear()
        elif word == "/undo":
            self.history.undo()
        elif word == "/seed" and (rest == "off" or rest.isdigit()):
            seed = None if rest == "off" else int(rest)
            self.options = Options(**{**self.options.__dict__, "infer_seed": seed})
        else:
            self.console.print(HELP, style="dim", highlight=False)
        return True


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags of `octavo chat`."""
    parser.add_argument("url", nargs="?", default="http://127.0.0.1:9965", help="http://host:9965 or grpc://host:8811")
    parser.add_argument("--api-key")
    parser.add_argument("--system", help="system message")
    parser.add_argument("--temperature", type=float)
    parser.add_argument("--top-p", type=float)
    parser.add_argument("--max-tokens", type=int)
    parser.add_argument("--seed", type=int)
    parser.add_argument("--plain", action="store_true", help="do not render Markdown")
    parser.add_argument("--once", metavar="TEXT", help="ask one question, print the answer, leave")


def run(arguments: argparse.Namespace) -> int:
    """The read-answer loop. Returns the exit code."""
    options = Options(
        temperature=arguments.temperature,
        topp=arguments.top_p,
        max_dec_len=arguments.max_tokens,
        infer_seed=arguments.seed,
    )
    with Client(arguments.url, api_key=arguments.api_key) as client:
        console = Console()
        if arguments.once is not None:
            return _once(client, arguments.once, options, system=arguments.system, console=console)
        session = Session(client, ChatHistory(system=arguments.system), options, console, plain=arguments.plain)
        console.print(HELP, style="dim", highlight=False)
        return _loop(session)


def _once(client: Client, question: str, options: Options, *, system: str | None, console: Console) -> int:
    history = ChatHistory(system=system).user(question)
    try:
        for delta in client.stream(history, options=options):
            console.print(delta.text, end="", markup=False, highlight=False)
    except (OctavoError, TransportLost) as error:
        console.print(f"[red]{error}[/red]", highlight=False)
        return 1
    console.print()
    return 0


def _loop(session: Session) -> int:
    while True:
        try:
            line = session.console.input("[bold cyan]you[/bold cyan] › ").strip()
        except (EOFError, KeyboardInterrupt):
            session.console.print()
            return 0
        if line.startswith("/"):
            if not session.command(line):
                return 0
        elif line:
            session.answer(line)
