"""Pictures of the Ray dashboard during a run, for docs/: a small pipeline as a Ray job, seen by a headless Chromium.

    .venv/bin/python scripts/dashboard_screenshot.py            # starts a local Ray and stops it
    .venv/bin/python scripts/dashboard_screenshot.py --dashboard http://127.0.0.1:8265   # of a Ray started in this folder

The local Ray keeps its token: the browser gets it as the dashboard's cookie over the DevTools protocol
(https://chromedevtools.github.io/devtools-protocol/), so nothing is opened to others. Before each picture the page's own text has
to show what the picture is for.
"""

from __future__ import annotations

import argparse
import asyncio
import base64
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import AsyncIterator, Iterator
from contextlib import ExitStack, asynccontextmanager, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import aiohttp
import pyarrow.parquet as pq
import yaml

if TYPE_CHECKING:
    from ray.job_submission import JobSubmissionClient

ROOT = Path(__file__).resolve().parents[1]
SAMPLES = ROOT / "nexus" / "data" / "samples"
BROWSERS = ("chromium", "chromium-browser", "google-chrome")
ACTORS = ("teacher:sample-reasoning", "trainer:distilled")
REPRS = ("TeacherActor(sample-reasoning)", "TrainerActor(distilled)")
TIMEOUT_S = 180.0
"""For each thing that is waited for; a busy machine takes minutes to start Ray and a pipeline."""
OPEN_DATA_SECTION = """
[...document.querySelectorAll("*")].filter(e => e.textContent.trim() == "Ray Data Overview").pop().click()
"""
FOCUS_REPR_FILTER = """
document.getElementById([...document.querySelectorAll("label")].find(e => e.textContent == "repr").htmlFor).focus()
"""
COOKIE = "ray-authentication-token"
WIDTH, HEIGHT = 1600, 1000


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--dashboard", help="http://HOST:PORT of a running cluster's dashboard; without it a local Ray is started"
    )
    parser.add_argument("--out", type=Path, default=ROOT / "docs")
    arguments = parser.parse_args()
    browser = next((path for name in BROWSERS if (path := shutil.which(name))), None)
    if browser is None:
        sys.exit(f"expected one of {', '.join(BROWSERS)} on the PATH, found none; install Chromium")
    arguments.out.mkdir(parents=True, exist_ok=True)
    # Short: a socket's path may have 107 characters. Ray's agents write to their logs until they are gone.
    with tempfile.TemporaryDirectory(prefix="nexus-", ignore_cleanup_errors=True) as name:
        folder = Path(name)
        with _cluster(arguments.dashboard, folder) as dashboard:
            asyncio.run(_take(browser, dashboard, arguments.out, folder))


@contextmanager
def _cluster(dashboard: str | None, folder: Path) -> Iterator[str]:
    """URL of the dashboard."""
    if dashboard is not None:
        yield dashboard
        return
    from actors.cluster import prepare_environment, resolve_cluster

    prepare_environment(resolve_cluster("local"))
    port, dashboard_port, agent_port = _free_ports(3)
    # `ray.init` would leave the port of the agent, which takes jobs, to the first Ray of a machine.
    command = f"start --head --block --num-cpus=4 --object-store-memory=200000000 --temp-dir={folder / 'ray'}"
    command += f" --port={port} --dashboard-port={dashboard_port} --dashboard-agent-listen-port={agent_port}"
    programs = Path(sys.executable).parent
    ray = subprocess.Popen(
        [str(programs / "ray"), *command.split(), "--disable-usage-stats"],
        stdout=subprocess.DEVNULL,
        cwd=ROOT,  # of the jobs, too, whose command the picture shows
        env=os.environ | {"PATH": f"{programs}:{os.environ['PATH']}"},
    )
    try:
        yield f"http://127.0.0.1:{dashboard_port}"
    finally:
        ray.terminate()
        ray.wait(timeout=60)


def _free_ports(count: int) -> list[int]:
    with ExitStack() as stack:
        sockets = [stack.enter_context(socket.socket()) for _ in range(count)]
        for each in sockets:
            each.bind(("127.0.0.1", 0))
        return [int(each.getsockname()[1]) for each in sockets]


async def _take(browser: str, dashboard: str, out: Path, folder: Path) -> None:
    from ray.job_submission import JobStatus

    jobs = await _jobs(dashboard)
    command = ["python", "jobs/pipeline.py", "--config", str(_config(folder)), "--out", str(folder / "run")]
    job = await _submit(jobs, " ".join(command))
    async with _page(browser, dashboard, folder) as page:
        await page.open(f"{dashboard}/#/jobs/{job}")
        await page.shows("Ray Data Overview")
        await page.run(OPEN_DATA_SECTION)
        await page.shows("nexus profile", "nexus extract")
        await page.picture(out / "dashboard-job.png")
        await page.open(f"{dashboard}/#/actors")
        await page.shows("Repr", *ACTORS[:1])
        # Ray Data and the jobs have actors, too; they would fill the first page of the table.
        await page.run(FOCUS_REPR_FILTER)
        await page.call("Input.insertText", {"text": "Actor("})
        await page.shows(*ACTORS, *REPRS, "ALIVE x 2")
        await page.picture(out / "dashboard-actors.png")
    limit = time.monotonic() + 3 * TIMEOUT_S
    while not (status := jobs.get_job_status(job)).is_terminal():
        if time.monotonic() > limit:
            jobs.stop_job(job)
        await asyncio.sleep(1)
    if status != JobStatus.SUCCEEDED:
        sys.exit(f"expected the pipeline to succeed, found {status}:\n{jobs.get_job_logs(job)}")


async def _jobs(dashboard: str) -> JobSubmissionClient:
    """Client of a dashboard that may still be starting."""
    from ray.job_submission import JobSubmissionClient

    limit = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return JobSubmissionClient(dashboard)
        except (ConnectionError, RuntimeError) as error:
            if time.monotonic() > limit:
                sys.exit(f"expected a dashboard at {dashboard}, found: {error}")
        await asyncio.sleep(1)


async def _submit(jobs: JobSubmissionClient, entrypoint: str) -> str:
    """Id of the job; a dashboard answers a while before its agent can take jobs."""
    limit = time.monotonic() + TIMEOUT_S
    while True:
        try:
            return jobs.submit_job(entrypoint=entrypoint, submission_id=f"nexus-{time.time():.0f}")
        except RuntimeError as error:
            if "No available agent" not in str(error) or time.monotonic() > limit:
                sys.exit(f"expected Ray to take a job, found: {error}")
        await asyncio.sleep(1)


def _config(folder: Path) -> Path:
    """A run of minutes: one teacher, few rows, steps enough for the page to show the trainer beside its teacher."""
    document = yaml.safe_load((ROOT / "configs" / "quickstart.yaml").read_text())
    pool = folder / "pool.parquet"
    pq.write_table(pq.read_table(SAMPLES / "reasoning" / "pool.parquet").slice(0, 256), pool)
    document["name"] = "dashboard"
    document["teachers"] = document["teachers"][:1]
    document["data"] = [document["data"][0] | {"pool": [str(pool)], "batch_size": 8}]
    document["profile"] = {"max_samples": 32, "batch_size": 8}
    document["distill"] |= {"steps": 400, "labels_only": False}
    document["evaluate"] = {"max_rows": 40}
    path = folder / "dashboard.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


class _Page:
    """One tab of a headless Chromium, driven over its DevTools websocket."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._calls = 0

    async def call(self, method: str, parameters: dict[str, Any] | None = None) -> dict[str, Any]:
        """Result of one DevTools command."""
        self._calls += 1
        await self._socket.send_json({"id": self._calls, "method": method, "params": parameters or {}})
        while True:
            answer = await self._socket.receive_json(timeout=60)
            if answer.get("id") != self._calls:
                continue  # an event
            if "error" in answer:
                raise RuntimeError(f"{method}: {answer['error']}")
            result: dict[str, Any] = answer["result"]
            return result

    async def open(self, url: str) -> None:
        """Go to `url`."""
        await self.call("Page.navigate", {"url": url})

    async def run(self, script: str) -> str:
        """Value of a JavaScript expression, as text."""
        answer = await self.call("Runtime.evaluate", {"expression": script})
        if "exceptionDetails" in answer:
            raise RuntimeError(f"{script}: {answer['exceptionDetails']}")
        return str(answer["result"].get("value", ""))

    async def shows(self, *texts: str) -> None:
        """Wait until the page shows all `texts`."""
        limit = time.monotonic() + TIMEOUT_S
        while True:
            # The body is absent for a moment after a page is opened.
            shown = " ".join((await self.run("document.body ? document.body.innerText : ''")).split())
            missing = [text for text in texts if text not in shown]
            if not missing:
                return
            if time.monotonic() > limit:
                sys.exit(f"expected {missing} on the page, found:\n{shown}")
            await asyncio.sleep(0.5)

    async def picture(self, path: Path) -> None:
        """Write what the tab shows."""
        image = await self.call("Page.captureScreenshot", {"format": "png"})
        path.write_bytes(base64.b64decode(image["data"]))
        print(f"{path}: {path.stat().st_size // 1024} KiB", flush=True)


@contextmanager
def _browser(browser: str, folder: Path) -> Iterator[str]:
    """DevTools port of a new Chromium."""
    profile = folder / "chromium"
    flags = "--headless=new --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking"
    flags += f" --disable-component-update --disable-sync --window-size={WIDTH},{HEIGHT} --remote-debugging-port=0"
    process = subprocess.Popen(
        [browser, *flags.split(), f"--user-data-dir={profile}", "about:blank"],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    try:
        port_file = profile / "DevToolsActivePort"
        limit = time.monotonic() + 60
        while not port_file.is_file() or not port_file.read_text().strip():
            if time.monotonic() > limit or process.poll() is not None:
                sys.exit("expected Chromium to open its DevTools port, found none")
            time.sleep(0.1)
        yield port_file.read_text().splitlines()[0]
    finally:
        process.terminate()
        process.wait(timeout=30)


@asynccontextmanager
async def _page(browser: str, dashboard: str, folder: Path) -> AsyncIterator[_Page]:
    """A tab that is signed in to the dashboard."""
    with _browser(browser, folder) as port:
        async with aiohttp.ClientSession() as session:
            async with session.get(f"http://127.0.0.1:{port}/json") as answer:
                tabs = json.loads(await answer.text())
            url = next(tab["webSocketDebuggerUrl"] for tab in tabs if tab["type"] == "page")
            async with session.ws_connect(url, max_msg_size=2**26) as socket:
                page = _Page(socket)
                token = _token()
                if token:
                    await page.call("Network.setCookie", {"name": COOKIE, "value": token, "url": dashboard})
                yield page


def _token() -> str | None:
    """The token that Ray's own clients would send; None where authentication is off."""
    if os.environ.get("RAY_AUTH_MODE") != "token":
        return None
    if token := os.environ.get("RAY_AUTH_TOKEN"):
        return token
    path = Path(os.environ.get("RAY_AUTH_TOKEN_PATH", Path.home() / ".ray" / "auth_token"))
    return path.read_text().strip()


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    main()
