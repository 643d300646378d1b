"""A Ray cluster: what of it a worker gets, and whether it is still there.

Ray's own processes are looked after: Ray would wait a minute for a dead head and then abort the driver, or
wait for ever. How many GPUs, cores and bytes a worker gets is plain arithmetic over the nodes.
"""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from typing import Any, TypeVar

from pipeline.decoders import DecoderShare
from pipeline.foreman import RESUMES
from pipeline.ray_join import answers, connect
from pipeline.starved import ProcessDied
from schemas.config import PreprocessConfig
from schemas.errors import ConfigError, RunError

STORE_SHARE = 0.3
"""Of the smallest object store: what frames on their way may fill, over all workers."""
POLL_S = 1.0
_SILENT_TRIES = 5
"""A second apart: how long Ray's head, or its process on this machine, may be away."""
_ACCELERATOR = "accelerator_type:"
Result = TypeVar("Result")
Node = Mapping[str, float]
"""Resources of a node that lives."""


class RayCluster:
    """A Ray cluster, this machine alone where `executor.address` is empty, and a worker's share of it.

    One that this process has joined already is gone on with.
    """

    def __init__(self, config: PreprocessConfig) -> None:
        """ConfigError where the workers can never all be placed on this machine."""
        settings = config.executor
        cores = settings.decoders_per_worker or 1
        self.ray = connect(config, cpus=settings.workers * cores + settings.decode_actors)
        try:
            nodes: list[Node] = [node["Resources"] for node in self.ray.nodes() if node["Alive"]]
            have: dict[str, float] = self.ray.cluster_resources()
            self._lifelines = self._addresses()
            self.gpus = gpus_per_worker(config, have=have.get("GPU", 0.0))
            self.gpu_names = sorted(
                {name.removeprefix(_ACCELERATOR) for name in have if name.startswith(_ACCELERATOR)}
                if self.gpus
                else ()
            )
            self.wants = f"{settings.workers} workers of {cores} CPU and {self.gpus:g} GPU each"
            if settings.decode_actors:
                self.wants += f" and {settings.decode_actors} decode actors of 1 CPU"
            self.has = f"{have.get('CPU', 0):g} CPU, {have.get('GPU', 0):g} GPU"
            _require_room(config, have, cores=cores, gpus=self.gpus, wants=self.wants, has=self.has)
            self.shares = decoder_shares(config, nodes, gpus=self.gpus)
        except BaseException:
            self.ray.shutdown()
            raise
        self._resources: dict[str, Any] = {"num_cpus": cores, "num_gpus": self.gpus}
        if not self.gpus and config.decode.device == "cpu":
            # Ray hides GPUs only from who asked for some.
            self._resources["runtime_env"] = {"env_vars": {"CUDA_VISIBLE_DEVICES": ""}}
        self._checked = time.monotonic()

    def actor(self, kind: type) -> Any:
        """`kind` as an actor with a worker's resources; on a GPU it sees that one alone."""
        return self.ray.remote(**self._resources)(kind)

    def run(self, function: Callable[..., Result], *args: Any) -> Result:
        """The result of a function, run where a worker will, in a process that ends with it.

        Its exceptions are raised here; MemoryError where Ray ended it for want of memory, ProcessDied where
        it died otherwise, RunError where Ray failed.
        """
        task = self.ray.remote(**self._resources, max_calls=1, max_retries=0)(function)
        errors = self.ray.exceptions
        future = task.remote(*args)
        try:
            while not self.ray.wait([future], timeout=POLL_S)[0]:
                self.require_life()
            result: Result = self.ray.get(future)
            return result
        except errors.RayTaskError as error:
            raise error.cause if isinstance(error.cause, Exception) else error from None
        except errors.OutOfMemoryError as error:
            raise MemoryError("Ray ended the process for want of memory") from error
        except errors.WorkerCrashedError as error:
            self.require_life(at_once=True)
            raise ProcessDied(f"a process that Ray ran died ({error})") from error
        except errors.RayError as error:
            self.require_life(at_once=True)
            raise RunError(f"a process that Ray was to run failed: {error}. {RESUMES}") from error

    def close(self) -> None:
        self.ray.shutdown()

    def require_life(self, *, at_once: bool = False) -> None:
        """Return where Ray's own processes answer, or did a second ago; RunError where one stays silent."""
        if not at_once and time.monotonic() - self._checked <= POLL_S:
            return
        for _ in range(_SILENT_TRIES):
            silent = self.silent()
            if not silent:
                self._checked = time.monotonic()
                return
            time.sleep(POLL_S)
        host, port = self._lifelines[silent[0]]
        raise RunError(
            f"Ray's {' and '.join(silent)} ({host}:{port}) no longer answers: it was killed, or ran out of "
            f"memory. {RESUMES}"
        )

    def silent(self) -> list[str]:
        """Which of Ray's own processes do not answer."""
        return [name for name, address in self._lifelines.items() if not answers(address)]

    def _addresses(self) -> dict[str, tuple[str, int]]:
        """Where the two processes of Ray listen that this one cannot do without."""
        context = self.ray.get_runtime_context()
        host, _, port = context.gcs_address.rpartition(":")
        nodes: list[dict[str, Any]] = self.ray.nodes()
        here = next(node for node in nodes if node["NodeID"] == context.get_node_id())
        return {
            "head": (host.strip("[]"), int(port)),
            "raylet": (here["NodeManagerAddress"], here["NodeManagerPort"]),
        }


def gpus_per_worker(config: PreprocessConfig, *, have: float) -> float:
    """GPU share of a worker: as set, else a whole one where an encoder, or the decoder, runs on GPUs and
    there are some; also where there are none, if a device is `cuda`."""
    if config.executor.gpus_per_worker is not None:
        return config.executor.gpus_per_worker
    models = [config.video_encoder.device] if config.video_encoder.kind != "dct" else []
    models += [config.text_encoder.device] if config.text_encoder.kind != "tiny-t5" else []
    devices = {*models, config.decode.device}
    return 1.0 if "cuda" in devices or ("auto" in devices and have) else 0.0


def decoder_shares(config: PreprocessConfig, nodes: Sequence[Node], *, gpus: float) -> list[DecoderShare]:
    """What each worker may have of decoders; ConfigError where their frames do not fit the object store.

    Children: the cores of the smallest node that can hold a worker, divided among as many as it can hold.
    Actors: dealt out evenly.
    """
    settings = config.executor
    workers, actors = settings.workers, settings.decode_actors
    if actors:
        window = store_window(config, nodes) // workers
        counts = [actors // workers + (number < actors % workers) for number in range(workers)]
        return [DecoderShare(count, count, window=window) for count in counts]
    if settings.decoders_per_worker:
        return [DecoderShare(settings.decoders_per_worker, settings.decoders_per_worker)] * workers
    most = [
        int(node["CPU"] // min(workers, node["GPU"] // gpus if gpus else node["CPU"]))
        for node in nodes
        if node.get("CPU", 0) >= 1 and node.get("GPU", 0) >= gpus
    ]
    # No node may be there yet, in a cluster that grows with what is asked of it.
    return [DecoderShare(1, max(1, min(most, default=os.cpu_count() or 1)))] * workers


def store_window(config: PreprocessConfig, nodes: Sequence[Node]) -> int:
    """Clips that may be in the object store at once: STORE_SHARE of the smallest one's bytes, since all may
    end up there; ConfigError for fewer than a clip a worker."""
    largest = max(bucket.num_frames * bucket.height * bucket.width * 3 for bucket in config.buckets)
    store = min(node.get("object_store_memory", 0.0) for node in nodes if node.get("CPU"))
    clips = math.floor(STORE_SHARE * store / largest)
    if clips < config.executor.workers:
        raise ConfigError(
            f"executor.decode_actors: {STORE_SHARE:.0%} of the smallest object store ({store / 2**20:.0f} "
            f"MiB) holds {clips} clips of {largest / 2**20:.0f} MiB, fewer than one for each of "
            f"{config.executor.workers} workers; lower executor.workers, or start Ray's nodes with a larger "
            "--object-store-memory"
        )
    return clips


def _require_room(
    config: PreprocessConfig, have: Node, *, cores: int, gpus: float, wants: str, has: str
) -> None:
    settings = config.executor
    if settings.decode_actors and config.decode.device == "cuda":
        raise ConfigError("executor.decode_actors decode on CPUs, and decode.device = 'cuda'; choose one")
    cpus = settings.workers * cores + settings.decode_actors
    fit = have.get("CPU", 0) >= cpus and have.get("GPU", 0) >= settings.workers * gpus
    if not fit and not settings.address:  # a cluster may grow
        raise ConfigError(
            f"executor: {wants} do not fit this machine ({has}); lower executor.workers, or "
            "executor.gpus_per_worker to share a GPU"
        )
