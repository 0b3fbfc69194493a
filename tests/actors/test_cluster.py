"""`--cluster`: what it resolves to, and that a dead address is told in seconds."""

from __future__ import annotations

import os
import socket
import stat
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import grpc
import pytest

from actors.cluster import HEALTH_METHOD, MALLOC_ENVIRONMENT, prepare_environment, resolve_cluster
from nexus.errors import ClusterError


@pytest.fixture
def clean_environment(monkeypatch, tmp_path):
    """No job, no address, no running cluster, an empty home."""
    for name in (
        "RAY_ADDRESS",
        "RAY_JOB_CONFIG_JSON_ENV_VAR",
        "RAY_AUTH_MODE",
        "RAY_AUTH_TOKEN",
        "RAY_AUTH_TOKEN_PATH",
    ):
        # Set first, so that what a test leaves in the environment goes with it.
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name in (*MALLOC_ENVIRONMENT, "RAY_BACKEND_LOG_LEVEL", "RAY_DATA_DISABLE_PROGRESS_BARS"):
        monkeypatch.setenv(name, "0")
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path))
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def listener():
    """A port that answers, as a GCS would."""
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        server.listen()
        yield f"127.0.0.1:{server.getsockname()[1]}"


def _closed_port() -> str:
    with socket.socket() as server:
        server.bind(("127.0.0.1", 0))
        return f"127.0.0.1:{server.getsockname()[1]}"


def test_auto_starts_a_local_cluster_when_none_runs(clean_environment):
    assert resolve_cluster("auto").mode == "local"


def test_auto_inside_a_job_joins_the_job_s_cluster(clean_environment, monkeypatch):
    monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    monkeypatch.setenv("RAY_ADDRESS", _closed_port())
    assert resolve_cluster("auto").mode == "job"


def test_auto_joins_the_address_of_the_environment(clean_environment, monkeypatch, listener):
    monkeypatch.setenv("RAY_ADDRESS", listener)
    target = resolve_cluster("auto")
    assert (target.mode, target.address) == ("join", listener)


def test_a_dead_address_is_an_error_within_seconds_and_never_a_fallback(clean_environment, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", _closed_port())
    start = time.monotonic()
    with pytest.raises(ClusterError, match="RAY_ADDRESS: expected a Ray cluster"):
        resolve_cluster("auto")
    assert time.monotonic() - start < 10  # a hang of Ray's own would be 100 s


def test_auto_joins_the_machine_s_running_cluster_and_ignores_a_dead_one(clean_environment, listener):
    folder = clean_environment / "ray"
    folder.mkdir()
    (folder / "ray_current_cluster").write_text(listener)
    assert resolve_cluster("auto").address == listener
    (folder / "ray_current_cluster").write_text(_closed_port())
    assert resolve_cluster("auto").mode == "local"


def test_local_ignores_every_address(clean_environment, monkeypatch):
    monkeypatch.setenv("RAY_ADDRESS", _closed_port())
    assert resolve_cluster("local").mode == "local"


@pytest.mark.parametrize("address", ["nonsense", "host:", ":6379", "host:port", "ray://host:10001", "host:99999"])
def test_a_malformed_address_is_refused(clean_environment, address):
    with pytest.raises(ClusterError, match="--cluster: expected"):
        resolve_cluster(address)


def test_a_dashboard_address_is_refused_with_the_job_command(clean_environment):
    with pytest.raises(ClusterError, match="ray job submit --address http://head:8265"):
        resolve_cluster("http://head:8265")


def test_a_local_start_gets_a_private_token_and_leaves_ray_s_own_absent(clean_environment):
    prepare_environment(resolve_cluster("local"))
    token = Path(os.environ["RAY_AUTH_TOKEN_PATH"])
    assert token.parent == clean_environment / "home" / ".ray"
    assert stat.S_IMODE(token.stat().st_mode) == 0o600
    assert len(token.read_text()) == 64
    # With it, `ray start --head` would ask `ray job submit` for a token that a plain shell does not send.
    assert not (clean_environment / "home" / ".ray" / "auth_token").exists()
    before = token.read_text()
    del os.environ["RAY_AUTH_TOKEN_PATH"]
    prepare_environment(resolve_cluster("local"))
    assert Path(os.environ["RAY_AUTH_TOKEN_PATH"]).read_text() == before


def test_a_token_of_the_user_s_own_is_used_as_it_is(clean_environment):
    token = clean_environment / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("x")
    prepare_environment(resolve_cluster("local"))
    assert "RAY_AUTH_TOKEN_PATH" not in os.environ
    assert [path.name for path in token.parent.iterdir()] == ["auth_token"]


def test_joining_a_cluster_that_nexus_started_finds_its_token(clean_environment, gcs):
    prepare_environment(resolve_cluster("local"))
    path = os.environ.pop("RAY_AUTH_TOKEN_PATH")
    prepare_environment(resolve_cluster(gcs(tokens=True)))
    assert os.environ["RAY_AUTH_TOKEN_PATH"] == path


def test_joining_makes_no_token(clean_environment, gcs):
    prepare_environment(resolve_cluster(gcs(tokens=True)))
    assert os.environ["RAY_AUTH_MODE"] == "token"
    assert not (clean_environment / "home").exists()


@pytest.fixture
def gcs():
    """Starts a real gRPC server that answers the health call as a GCS with or without tokens does."""
    servers = []

    def start(*, tokens: bool) -> str:
        def answer(_request: bytes, context: grpc.ServicerContext) -> bytes:
            if tokens:
                context.abort(grpc.StatusCode.UNAUTHENTICATED, "InvalidAuthToken")
            return b""

        service, method = HEALTH_METHOD.strip("/").split("/")
        handler = grpc.method_handlers_generic_handler(service, {method: grpc.unary_unary_rpc_method_handler(answer)})
        server = grpc.server(ThreadPoolExecutor(1))
        server.add_generic_rpc_handlers((handler,))
        port = server.add_insecure_port("127.0.0.1:0")
        server.start()
        servers.append(server)
        return f"127.0.0.1:{port}"

    yield start
    for server in servers:
        server.stop(None)


@pytest.mark.parametrize(("tokens", "mode"), [(True, "token"), (False, "disabled")])
@pytest.mark.parametrize("inside_a_job", [False, True])
def test_joining_authenticates_as_the_cluster_does_whatever_token_file_there_is(
    clean_environment, monkeypatch, gcs, tokens, mode, inside_a_job
):
    if inside_a_job:
        monkeypatch.setenv("RAY_JOB_CONFIG_JSON_ENV_VAR", "{}")
    token = clean_environment / "home" / ".ray" / "auth_token"
    token.parent.mkdir(parents=True)
    token.write_text("x")
    monkeypatch.setenv("RAY_ADDRESS", gcs(tokens=tokens))
    prepare_environment(resolve_cluster("auto"))
    assert os.environ["RAY_AUTH_MODE"] == mode


@pytest.mark.parametrize(("tokens", "mode"), [(True, "disabled"), (False, "token")])
def test_a_cluster_with_another_authentication_than_the_shell_is_refused(
    clean_environment, monkeypatch, gcs, tokens, mode
):
    monkeypatch.setenv("RAY_AUTH_MODE", mode)
    with pytest.raises(ClusterError, match=f"RAY_AUTH_MODE={mode}, as this shell has it"):
        prepare_environment(resolve_cluster(gcs(tokens=tokens)))


def test_a_port_that_is_no_cluster_s_is_told_in_seconds(clean_environment, listener):
    with pytest.raises(ClusterError, match="does not answer as one"):
        prepare_environment(resolve_cluster(listener))


def test_certificates_leave_the_choice_to_the_shell(clean_environment, monkeypatch, listener):
    monkeypatch.setenv("RAY_USE_TLS", "1")
    prepare_environment(resolve_cluster(listener))
    assert "RAY_AUTH_MODE" not in os.environ
