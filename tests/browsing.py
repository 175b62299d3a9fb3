"""A page in a browser, without a network; the board, served here."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

AXE = Path(__file__).parent / "report" / "axe" / "axe.min.js"

LAPTOP = (1366, 768)
FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    "--force-prefers-reduced-motion",  # or a click would have to wait until the page has scrolled
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1",
)


def texts(browser, selector: str) -> list[str]:
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((one) => one.textContent.trim())",
        selector,
    )


def violations(browser) -> list[str]:
    """What axe-core finds on the page that is open: rules and the nodes that break them."""
    browser.execute_script(AXE.read_text(encoding="utf-8"))
    browser.set_script_timeout(120)
    return browser.execute_async_script("""
        const done = arguments[arguments.length - 1];
        axe.run({ resultTypes: ["violations"] }).then(
          ({ violations }) => done(violations.map(({ id, help, nodes }) =>
            `${id}: ${help}: ${nodes.slice(0, 3).map((one) => one.html)}`)),
          (error) => done([String(error)]))""")


@contextmanager
def served(folder: Path, token: str | None = None) -> Iterator[int]:
    """The board of a folder's runs; its port."""
    from ssl_bench.report import board  # conftest sets up what it imports first

    with board.server([folder], None, "127.0.0.1", 0, token) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.05,))
        thread.start()
        yield server.server_address[1]
        server.shutdown()
        thread.join()
