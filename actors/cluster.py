"""Which Ray cluster a command uses: `auto | local | HOST:PORT`, resolved before Ray is imported.

`auto` joins the cluster of the surrounding Ray job, else RAY_ADDRESS, else the machine's running cluster, else starts a local one.
An address is probed by TCP first: `ray.init` on a dead address was measured to block for more than 100 s. Ray decides about
token authentication when it is imported, so `prepare_environment` runs before any `import ray`.
"""

from __future__ import annotations

import logging
import os
import secrets
import socket
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from nexus.errors import ClusterError

logger = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 2.0
LOCAL_STARTS = 2
"""Ray gives its node 30 s to come up and cannot be told otherwise; a busy machine needs more, and the second start finds warm
caches."""
SLOW_START = "timed out during startup"
CURRENT_CLUSTER_FILE = "ray_current_cluster"
HEALTH_METHOD = "/ray.rpc.NodeInfoGcsService/CheckAlive"
"""Takes an empty request; needs a token where the cluster does."""
TOKEN_FILE = "nexus_auth_token"
"""Below ~/.ray: the token of the clusters that nexus starts; the dashboard asks for it."""
JOB_MARKER = "RAY_JOB_CONFIG_JSON_ENV_VAR"
"""Set by Ray in the entrypoint of a submitted job."""

MALLOC_ENVIRONMENT = {"MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_MMAP_THRESHOLD_": "1073741824"}
"""glibc returns freed tensors to the kernel by default, and pays page faults to get them back; large thresholds keep them."""


@dataclass(frozen=True)
class ClusterTarget:
    """What `--cluster` resolved to, before anything is started."""

    mode: Literal["job", "join", "local"]
    address: str | None
    """HOST:PORT to join; None for a local start and inside a job."""
    reason: str
    """How it was found, for the first line that a command prints."""


@dataclass(frozen=True)
class ClusterSession:
    """A connected cluster."""

    target: ClusterTarget
    namespace: str
    description: str
    node_id: str
    session_name: str
    """Name of Ray's session folder; every process of the cluster carries it in its command line or descends from one."""


def resolve_cluster(cluster: str) -> ClusterTarget:
    """Resolve `--cluster` without importing Ray.

    Raises:
        ClusterError: when an address is malformed, or nothing answers there within 2 s.
    """
    if cluster == "local":
        return ClusterTarget("local", None, "asked for")
    if cluster == "auto":
        return _resolve_auto()
    _probe(cluster, "--cluster")
    return ClusterTarget("join", cluster, "--cluster")


def _resolve_auto() -> ClusterTarget:
    if os.environ.get(JOB_MARKER):
        return ClusterTarget("job", None, "inside a submitted Ray job")
    address = os.environ.get("RAY_ADDRESS")
    if address:
        # Never fall back: whoever sets RAY_ADDRESS wants that cluster and no other.
        _probe(address, "RAY_ADDRESS")
        return ClusterTarget("join", address, "RAY_ADDRESS")
    current = Path(os.environ.get("RAY_TMPDIR", "/tmp")) / "ray" / CURRENT_CLUSTER_FILE  # nosec B108 # Ray's own place
    if current.is_file():
        address = current.read_text().strip()
        try:
            _probe(address, str(current))
        except ClusterError:
            # Left behind by a cluster that is gone; Ray never removes the file after a crash.
            return ClusterTarget("local", None, "no running cluster was found")
        return ClusterTarget("join", address, "running on this machine")
    return ClusterTarget("local", None, "no running cluster was found")


def _probe(address: str, source: str) -> None:
    if address.startswith(("http://", "https://")):
        raise ClusterError(
            f"{source}: expected HOST:PORT of a cluster's GCS, found the dashboard address {address}. "
            f"Use `ray job submit --address {address} -- python jobs/distill.py`."
        )
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if not colon or not host or not port.isdigit() or address.startswith("ray://"):
        raise ClusterError(
            f"{source}: expected auto, local or HOST:PORT, found {address!r}. Example: --cluster 10.0.0.5:6379"
        )
    try:
        with socket.create_connection((host, int(port)), timeout=PROBE_TIMEOUT_S):
            return
    except (OSError, OverflowError) as error:
        raise ClusterError(
            f"{source}: expected a Ray cluster at {address}, found no answer within {PROBE_TIMEOUT_S:.0f} s ({error}). "
            "Start one with `ray start --head`, or use --cluster local."
        ) from None


def prepare_environment(target: ClusterTarget) -> None:
    """Set what has to stand in the environment before Ray is imported; existing settings win.

    Raises:
        ClusterError: when the cluster to join wants another authentication than RAY_AUTH_MODE says, or is no Ray cluster.
    """
    if target.mode == "local":
        if os.environ.setdefault("RAY_AUTH_MODE", "token") == "token":
            _provide_token(create=True)
    else:
        _follow_authentication(target.address or os.environ.get("RAY_ADDRESS"))
    # Ray Data's own actor pools make Ray's core print an error about their constructor arguments at every start.
    os.environ.setdefault("RAY_BACKEND_LOG_LEVEL", "fatal")
    # Behind an interrupt a thread of Ray Data may still ask for something, which would start or join another Ray.
    os.environ.setdefault("RAY_ENABLE_AUTO_CONNECT", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")
    os.environ.setdefault("RAY_DATA_DISABLE_PROGRESS_BARS", "1")
    for name, value in MALLOC_ENVIRONMENT.items():
        os.environ.setdefault(name, value)


def _follow_authentication(address: str | None) -> None:
    """Authenticate as the cluster does: Ray itself goes by whether a token file exists, which may be younger than the cluster.

    A client that wants tokens from a cluster that has none loses its actors as soon as it creates them.
    """
    if address is None or os.environ.get("RAY_USE_TLS", "0") != "0":
        return  # whoever sets up certificates sets RAY_AUTH_MODE, too
    found = "token" if _asks_for_token(address) else "disabled"
    if found == "token":
        _provide_token(create=False)
    wanted = os.environ.setdefault("RAY_AUTH_MODE", found)
    if wanted != found:
        raise ClusterError(
            f"Expected the cluster at {address} to run with RAY_AUTH_MODE={wanted}, as this shell has it, found {found}. "
            f"Type `export RAY_AUTH_MODE={found}`, or start the cluster again in this shell."
        )


def _provide_token(*, create: bool) -> None:
    """Point Ray at the token of local clusters where the user has none of their own.

    Not Ray's own `~/.ray/auth_token`, which Ray would write readable by everyone: once that exists, `ray start --head` turns tokens
    on, and `ray job submit` fails in a shell without RAY_AUTH_MODE.
    """
    ray_token = Path.home() / ".ray" / "auth_token"
    if any(os.environ.get(name) for name in ("RAY_AUTH_TOKEN", "RAY_AUTH_TOKEN_PATH")) or ray_token.exists():
        return
    token = Path.home() / ".ray" / TOKEN_FILE
    if not token.exists():
        if not create:
            return
        token.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    os.environ["RAY_AUTH_TOKEN_PATH"] = str(token)


def _asks_for_token(address: str) -> bool:
    """Whether the cluster refuses a call without a token."""
    import grpc

    with grpc.insecure_channel(address, options=(("grpc.enable_http_proxy", 0),)) as channel:
        try:
            channel.unary_unary(HEALTH_METHOD)(b"", timeout=PROBE_TIMEOUT_S)
        except grpc.RpcError as error:
            if error.code() == grpc.StatusCode.UNAUTHENTICATED:
                return True
            raise ClusterError(
                f"Expected a Ray cluster at {address}, found something that does not answer as one ({error.code().name}). "
                "Give HOST:PORT of its GCS; `ray start --head` prints it."
            ) from None
    return False


def connect(
    target: ClusterTarget,
    *,
    namespace: str,
    num_cpus: int,
    object_store_mib: int,
    torch_threads: int,
    dashboard: bool,
) -> ClusterSession:
    """Join or start the cluster; `num_cpus`, `object_store_mib` and `dashboard` apply to a local start alone.

    Raises:
        ClusterError: when Ray refuses (other version, other token), with Ray's reason in one line.
    """
    import ray

    environment = {
        "OMP_NUM_THREADS": str(torch_threads),
        "HF_HUB_OFFLINE": os.environ.get("HF_HUB_OFFLINE", "1"),
        "TOKENIZERS_PARALLELISM": "false",
        **{name: os.environ[name] for name in MALLOC_ENVIRONMENT},
    }
    options: dict[str, Any] = {
        "namespace": namespace,
        "log_to_driver": False,
        "logging_level": logging.ERROR,
        "runtime_env": {"env_vars": environment},
    }
    if target.mode == "local":
        options |= {
            "address": "local",
            "num_cpus": num_cpus,
            "object_store_memory": object_store_mib * 2**20,
            "include_dashboard": dashboard,
        }
    else:
        options |= {"address": target.address or "auto"}
    logging.getLogger("ray.data").setLevel(logging.ERROR)
    context = _init(options, target)
    resources = ray.cluster_resources()
    where = (
        "started a local Ray"
        if target.mode == "local"
        else f"joined the Ray cluster at {context.address_info['gcs_address']}"
    )
    dashboard_url = context.dashboard_url
    description = (
        f"{where} ({target.reason}): ray {ray.__version__}, {resources.get('CPU', 0):g} CPUs, "
        f"{resources.get('GPU', 0):g} GPUs, auth {os.environ.get('RAY_AUTH_MODE', 'as the cluster')}"
        + (f", dashboard http://{dashboard_url}" if dashboard_url else "")
    )
    session_name = Path(context.address_info["session_dir"]).name
    return ClusterSession(target, namespace, description, ray.get_runtime_context().get_node_id(), session_name)


def _init(options: dict[str, Any], target: ClusterTarget) -> Any:
    """`ray.init`, whose errors become one line; a local start that took too long is tried once more."""
    import ray

    attempts = LOCAL_STARTS if target.mode == "local" else 1
    for attempt in range(1, attempts + 1):
        try:
            return ray.init(**options)
        except Exception as error:  # Ray raises a bare Exception when its node does not come up within 30 s
            ray.shutdown()
            if attempt < attempts and SLOW_START in str(error):
                logger.warning("Ray did not start in time (busy machine?); once more")
                continue
            reason = " ".join(str(error).split())[:300]
            raise ClusterError(
                f"Expected to {'start' if target.mode == 'local' else 'join'} a Ray cluster ({target.reason}), found: {reason}. "
                "`nexus doctor` shows what this machine has."
            ) from None
    raise AssertionError("the last attempt returns or raises")
