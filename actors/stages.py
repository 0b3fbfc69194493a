"""The stages of a run: profile -> extract -> distill -> route -> evaluate -> export -> report.

Each stage reads the artefacts of the earlier ones from the run directory, writes its own, and last its record; a stage that was
cut short has no record and continues. `run_stages` brings a run up to a stage, leaving out what is complete.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from actors.session import FACTS_FILE, Interrupted, Session
from nexus.artifacts import TRANSPORTS_FILE, NIWTProfile, StageRecord, TransportsFile, read_artifact, write_artifact
from nexus.config import DataConfig, RunConfig, resolve_path
from nexus.errors import ArtifactError
from nexus.run import STAGES

if TYPE_CHECKING:
    from actors.dataflow import TeacherWork
    from actors.trainer import TrainerProgress
    from nexus.data.records import Record
    from nexus.profiling.journal import ProfileJournal
    from nexus.towers.targets import ScoreRequest
    from nexus.training.facts import TeacherFacts

NEEDS: Mapping[str, tuple[str, ...]] = {
    "profile": (),
    "extract": (),
    "distill": ("profile", "extract"),
    "route": ("distill",),
    "evaluate": ("route",),
    "export": ("evaluate",),
    "report": ("export",),
}
"""Which stages a stage reads from."""

READS_INPUTS = ("profile", "extract", "distill")
"""Stages for which data and teachers are looked at before Ray starts."""


def needs(stage: str, config: RunConfig) -> tuple[str, ...]:
    """Which stages a stage of this run reads from: cached targets hold the states of the critical layers."""
    return (*NEEDS[stage], "profile") if stage == "extract" and config.cached_teachers else NEEDS[stage]


def closure(stage: str, config: RunConfig) -> tuple[str, ...]:
    """`stage` and everything that it needs, in running order."""
    wanted = {stage}
    for name in reversed(STAGES):
        if name in wanted:
            wanted.update(needs(name, config))
    return tuple(name for name in STAGES if name in wanted)


def run_stages(session: Session, last: str, *, inject_spike: str | None = None) -> dict[str, StageRecord]:
    """Run what is missing up to `last`; returns the records of all stages in running order.

    Raises:
        NexusError: from the stage that failed; earlier stages stay complete.
    """
    records: dict[str, StageRecord] = {}
    redo: set[str] = set()
    for stage in closure(last, session.config):
        session.check_signals()
        done = session.run.completed(stage)
        # A stage whose input was made anew is made anew.
        if done and not redo.intersection(needs(stage, session.config)):
            session.reporter.line(f"{stage}: complete ({done.seconds:.1f} s, earlier)")
            records[stage] = done
            continue
        session.run.reset(stage)
        redo.add(stage)
        if stage in READS_INPUTS:
            session.check_inputs()
        session.memory.reset()
        start = time.perf_counter()
        outputs, summary = _run(stage, session, inject_spike)
        # What was done for some of the teachers is journalled; the stage is complete when it was done for all.
        finish = session.run.complete if session.has_all_teachers else session.run.describe
        records[stage] = finish(
            stage,
            seconds=time.perf_counter() - start,
            peak_memory_gib=session.memory.peak_gib,
            outputs=outputs,
            summary=summary,
        )
        if stage == "profile" and session.has_all_teachers:
            profile_journal(session).remove()
        if stage == "report":
            # Once more, now with the cost of the report itself.
            from actors.evaluation import write_metrics

            write_metrics(session)
        news = ", ".join(f"{key} {value}" for key, value in summary.items())
        session.reporter.line(
            f"{stage}: done in {records[stage].seconds:.1f} s, {records[stage].peak_memory_gib:.2f} GiB"
            + (f" ({news})" if news else "")
        )
    return records


Summary = dict[str, "float | int | str"]


def _run(stage: str, session: Session, inject_spike: str | None) -> tuple[list[Path], Summary]:
    if stage == "distill":
        return distill(session, inject_spike=inject_spike)
    stages: dict[str, Callable[[Session], tuple[list[Path], Summary]]] = {
        "profile": profile,
        "extract": extract,
        "route": route,
        "evaluate": evaluate,
        "export": export,
        "report": report,
    }
    return stages[stage](session)


# --- profile ------------------------------------------------------------------------------------------------------------------


def profile(session: Session) -> tuple[list[Path], Summary]:
    """Measure what each layer of each teacher is worth, on labelled rows streamed by Ray Data; two files per teacher.

    Rows come in rounds, after which teachers whose critical layers are stable get no more. What the second pass of a profile needs
    of the first (`nexus.profiling.consolidation`) is then measured on a few rows that were kept. An interrupted stage continues from
    its journal.
    """
    from actors.profiling import profile_teachers
    from nexus.profiling.consolidation import consolidate, write_tensors
    from nexus.profiling.sampling import budget_note

    config = session.config
    reports = session.load_reports
    outputs = []
    summary: Summary = {}
    for found in profile_teachers(session, profile_journal(session), time.perf_counter()):
        path = session.run.path / "profile" / f"{found.teacher}.json"
        tensors = path.with_suffix(".safetensors")
        if found.plan.critical_layers:
            write_tensors(tensors, found.merged, found.plan)
            outputs.append(tensors)
        num_samples = len(found.merged.sample_ids)
        result: NIWTProfile = consolidate(
            [found.merged],
            teacher=found.teacher,
            revision=reports[found.teacher].fingerprint,
            seconds=found.seconds,
            seed=config.seed,
            partial=found.is_partial,
            note=budget_note(num_samples, config.profile.budget_seconds or 0.0) if found.is_partial else None,
            confirmations=found.confirmations,
            capabilities={name: [part] for name, part in found.capabilities.items()},
            stopped_early=found.stopped_early,
            tensors=tensors.name,
        )
        write_artifact(path, result)
        outputs.append(path)
        critical = " ".join(str(layer.layer) for layer in result.critical_layers) or "none"
        summary[found.teacher] = (
            f"critical layers {critical} of {result.num_layers}{', partial' if found.is_partial else ''}"
        )
    return outputs, summary


def profile_journal(session: Session) -> ProfileJournal:
    """What an unfinished profile stage has measured."""
    from nexus.profiling.journal import ProfileJournal

    return ProfileJournal(session.run.path / "profile" / "journal")


# --- extract ------------------------------------------------------------------------------------------------------------------


def extract(session: Session) -> tuple[list[Path], Summary]:
    """Let the language teachers answer the unlabelled prompts, once, to Parquet; continued file by file after an interruption."""
    from actors.dataflow import TeacherWork
    from nexus.data.targets import TargetWriter

    config = session.config
    settings = config.extract
    writers: list[TargetWriter] = []
    works: list[TeacherWork] = []
    for teacher, source in _language_assignments(session):
        writer = TargetWriter(
            session.run.path / "targets" / teacher,
            capability=source.capability,
            fingerprint=session.fingerprints[teacher],
            rows_per_file=settings.rows_per_file,
        )
        if writer.complete:
            continue
        writers.append(writer)
        works.append(
            TeacherWork(
                teacher=teacher,
                capability=source.capability,
                paths=_paths(source.pool),
                skip_rows=writer.rows_read,
                max_rows=None if settings.max_rows is None else max(0, settings.max_rows - writer.rows_read),
                method="answer",
                arguments=(source.max_new_tokens, None),
                batch_size=settings.batch_size,
            )
        )
    done = 0
    busy: dict[str, float | None] = {}
    for wave in _waves(works, config.cluster.resident_teachers):
        for answer in session.stream([works[index] for index in wave], "nexus extract"):
            index = wave[answer.work]
            if answer.records:
                writers[index].write(answer.records, answer.result, answer.positions)
            done += len(answer.records)
            session.reporter.progress("extract", done, None, works[index].teacher)
        for index in wave:
            writers[index].finish()
        busy |= {teacher: session.pool.busy_share(teacher) for teacher in {works[index].teacher for index in wave}}
    outputs, summary = _extract_scores(session)
    summary |= {f"{teacher} busy": f"{share:.0%}" for teacher, share in sorted(busy.items()) if share is not None}
    for teacher, source in _language_assignments(session):
        folder = session.run.path / "targets" / teacher
        files = TargetWriter.files(folder, source.capability)
        outputs += files
        summary[f"{teacher}/{source.capability}"] = f"{TargetWriter.rows_of(folder, source.capability)} rows"
    return outputs, summary


def _extract_scores(session: Session) -> tuple[list[Path], Summary]:
    """Let the teachers whose targets are cached score the rows that the student will train on; continued file by file."""
    outputs: list[Path] = []
    summary: Summary = {}
    config = session.config
    if not config.cached_teachers:
        return outputs, summary
    from nexus.data.targets import ScoreWriter
    from nexus.training.facts import TeacherFactsFile
    from nexus.training.sources import SCORES_DIR

    facts = {teacher.id: teacher for teacher in _teacher_facts(session, _profiles(session), from_files=False)}
    for teacher in config.cached_teachers:
        folder = session.run.path / "targets" / teacher
        write_artifact(folder / FACTS_FILE, TeacherFactsFile.from_facts([facts[teacher]]))
        outputs.append(folder / FACTS_FILE)
        for capability in next(entry.capabilities for entry in config.teachers if entry.id == teacher):
            rows = _score_rows(session, facts[teacher], capability)
            outputs += ScoreWriter.files(folder / SCORES_DIR, capability)
            summary[f"{teacher}/{capability} targets"] = f"{rows} rows"
    return outputs, summary


def _score_rows(session: Session, teacher: TeacherFacts, capability: str) -> int:
    """Rows whose targets are then written; 0 where its answers already say all that the student asks of it."""
    from nexus.data.loader import iter_records
    from nexus.data.media import usable
    from nexus.data.quarantine import Quarantine
    from nexus.data.targets import ScoreWriter, TargetWriter
    from nexus.training.facts import CapabilityFacts
    from nexus.training.requests import is_asked, score_request, settings_of
    from nexus.training.setup import compared_by_span, transport_of
    from nexus.training.sources import SCORES_DIR

    config, source = session.config, session.config.data_of(capability)
    by_span = teacher.id in compared_by_span(config, (teacher,))
    if not is_asked(teacher, by_span=by_span):
        return 0

    def request_for(records: Sequence[Record]) -> ScoreRequest:
        return score_request(
            teacher,
            records,
            temperature=config.distill.temperature,
            by_span=by_span,
            top_k=config.distill.top_k,
            transport=transport_of(config, teacher.id),
            capability=CapabilityFacts(capability, source.towers, source.snr_db),
        )

    folder = session.run.path / "targets" / teacher.id
    writer = ScoreWriter(
        folder / SCORES_DIR,
        capability=capability,
        settings=settings_of(request_for(()), teacher),
        rows_per_file=config.extract.rows_per_file,
    )
    if writer.complete:
        return writer.rows
    quarantine = Quarantine(session.run.path / "quarantine", config.quarantine.max_bad_share)
    own = TargetWriter.files(folder, capability) if teacher.role == "causal_lm" else []
    paths = own or [Path(path) for path in _paths(source.pool)]
    records = islice(
        usable(iter_records(paths, capability=capability, quarantine=quarantine), quarantine), writer.rows, None
    )
    # Of two batches in flight one is always waiting at the teacher.
    flying: deque[int] = deque()
    number = 0
    while batch := list(islice(records, config.extract.batch_size)):
        session.pool.submit(("scores", number), teacher.id, "score", request_for(batch))
        flying.append(number)
        number += 1
        if len(flying) > 1:
            writer.write(session.pool.collect(("scores", flying.popleft())))
        session.reporter.progress("extract", number * config.extract.batch_size, None, f"{teacher.id} targets")
    for left in flying:
        writer.write(session.pool.collect(("scores", left)))
    writer.finish()
    return writer.rows


def _profiles(session: Session) -> dict[str, NIWTProfile]:
    return {
        teacher.id: read_artifact(session.run.path / "profile" / f"{teacher.id}.json", NIWTProfile)
        for teacher in session.config.teachers
    }


def _waves(works: Sequence[TeacherWork], residents: int | None) -> Iterator[list[int]]:
    """Indices of the works whose teachers are awake together, wave by wave: each teacher is woken once."""
    teachers = list(dict.fromkeys(work.teacher for work in works))
    size = residents or len(works)
    for start in range(0, len(teachers), max(1, size)):
        wave = teachers[start : start + size]
        yield [index for index, work in enumerate(works) if work.teacher in wave]


def _language_assignments(session: Session) -> list[tuple[str, DataConfig]]:
    """Teacher and data of every language teacher, whose completions are generated."""
    roles = session.roles
    return [
        (teacher.id, session.config.data_of(capability))
        for teacher in session.config.teachers
        if roles[teacher.id] == "causal_lm"
        for capability in teacher.capabilities
    ]


# --- distill ------------------------------------------------------------------------------------------------------------------


def distill(session: Session, *, inject_spike: str | None = None) -> tuple[list[Path], Summary]:
    """Train the student from its teachers and, beside it, the same student from the labelled rows alone."""
    import ray

    from actors.pool import sleep_of
    from actors.trainer import STOP_TIMEOUT_S, TrainerActor, TrainerPlan
    from nexus.training.facts import TeacherFactsFile
    from nexus.training.loop import parse_spike
    from nexus.training.objective import check_answered
    from nexus.training.setup import compared_by_span, save_teacher_tokenizer, save_tokenizer

    config = session.config
    if inject_spike is not None:
        parse_spike(inject_spike, steps=config.distill.steps)
    facts = _teacher_facts(session, _profiles(session), from_files=True)
    check_answered(
        facts, {source.capability: [t.id for t in config.teachers_of(source.capability)] for source in config.data}
    )
    write_artifact(session.run.path / FACTS_FILE, TeacherFactsFile.from_facts(facts))
    save_tokenizer(_tokenizer_folder(session), session.run.path)
    for teacher in compared_by_span(config, facts):
        save_teacher_tokenizer(session.checkpoint_of(teacher), session.run.path, teacher)
    students = ["distilled", *(["labels_only"] if config.distill.labels_only else [])]
    actors = {}
    references = {}
    device = session.student_device()
    planned = session.planned_places
    share = session.gpu_share(sum(teacher.replicas for teacher in config.teachers) + len(students))
    remote = ray.remote(concurrency_groups={"control": 1})  # type: ignore[call-overload]  # Ray left it out of its types
    for student in students:
        options = session.actor_options(f"trainer:{student}")
        if planned is not None:
            options |= planned.options[f"student:{student}"][0]
        elif device == "cuda":
            options |= {"num_gpus": share}
        plan = TrainerPlan(
            config=config,
            run_dir=str(session.run.path),
            working_dir=str(Path.cwd()),
            student=student,
            teachers=facts,
            inject_spike=inject_spike if student == "distilled" else None,
            device=device if options.get("num_gpus") else "cpu",
            sleep=sleep_of(config) if planned is None else planned.sleep,
        )
        actors[student] = remote(TrainerActor).options(**options).remote(plan)
        references[actors[student].train.remote()] = student
    results = {}
    pending = list(references)
    try:
        while pending:
            session.check_signals()
            ready, pending = ray.wait(pending, num_returns=1, timeout=1.0)
            for reference in ready:
                student = references[reference]
                results[student] = session.wait_for(reference)
                # Its half GiB is wanted by the stages to come.
                ray.kill(actors[student])
            progress = [_progress(actor) for name, actor in actors.items() if name not in results]
            for news in progress:
                if news is not None:
                    session.reporter.progress(f"distill {news.student}", news.step, news.steps, news.note)
    except Interrupted:
        session.reporter.line("stopping: saving the state of training")
        for actor in actors.values():
            actor.request_stop.options(concurrency_group="control").remote()
        ray.wait(list(references), num_returns=len(references), timeout=STOP_TIMEOUT_S)
        raise
    outputs = [session.run.path / name for result in results.values() for name in result.files]
    main = results["distilled"]
    write_artifact(session.run.path / TRANSPORTS_FILE, TransportsFile(teachers=dict(main.transports)))
    outputs.append(session.run.path / TRANSPORTS_FILE)
    summary: Summary = {
        "steps": main.steps,
        "student_parameters": main.num_parameters,
        "skipped": main.skipped,
        "rollbacks": main.rollbacks,
        "rows_per_second": round(main.rows / main.seconds, 1) if main.seconds else 0.0,
        "wait_share": round(main.wait_seconds / main.seconds, 3) if main.seconds else 0.0,
    }
    if main.swap_share is not None:
        summary |= {"swaps": main.swaps, "swap_share": round(main.swap_share, 3)}
    return outputs, summary


def _progress(actor: Any) -> TrainerProgress | None:
    import ray
    from ray.exceptions import GetTimeoutError, RayError

    try:
        return ray.get(actor.progress.options(concurrency_group="control").remote(), timeout=5)
    except (GetTimeoutError, RayError):
        return None  # the train() reference tells what happened


def _tokenizer_folder(session: Session) -> Path:
    """Where the student's tokenizer comes from: its pretrained trunk, or a teacher."""
    student = session.config.student
    if student.trunk is not None:
        return resolve_path(student.trunk)
    assert student.tokenizer is not None, "the schema asks for one of both"
    return session.checkpoint_of(student.tokenizer)


def _teacher_facts(
    session: Session, profiles: Mapping[str, NIWTProfile], *, from_files: bool
) -> tuple[TeacherFacts, ...]:
    """What training has to know of every teacher; `from_files` takes those with cached targets from what extraction wrote, and
    does not load them."""
    from transformers import AutoTokenizer

    from nexus.towers.loader import tokenizer_hash
    from nexus.training.facts import TeacherFacts, TeacherFactsFile, profiled_importance

    config = session.config
    written = {
        teacher: read_artifact(session.run.path / "targets" / teacher / FACTS_FILE, TeacherFactsFile).to_facts()[0]
        for teacher in (config.cached_teachers if from_files else ())
    }
    live = [teacher.id for teacher in config.teachers if teacher.id not in written]
    reports = session.reports_of(live)
    for teacher in live:
        if profiles[teacher].revision != reports[teacher].fingerprint:
            raise ArtifactError(
                f"Expected teacher {teacher} as it was profiled ({profiles[teacher].revision}), found another "
                f"({reports[teacher].fingerprint}). Put the former back, or choose another --out to begin anew."
            )
    student_hash = tokenizer_hash(AutoTokenizer.from_pretrained(_tokenizer_folder(session)))
    return tuple(
        written[teacher.id]
        if teacher.id in written
        else TeacherFacts(
            id=teacher.id,
            role=session.roles[teacher.id],
            importance=profiled_importance(profiles[teacher.id])
            if teacher.importance == "profile"
            else teacher.importance,
            shares_tokenizer=reports[teacher.id].tokenizer_hash == student_hash,
            vocabulary_size=reports[teacher.id].vocabulary_size,
            num_layers=reports[teacher.id].num_layers,
            hidden_size=reports[teacher.id].hidden_size,
            label_texts=reports[teacher.id].label_texts,
            fingerprint=reports[teacher.id].fingerprint,
            critical_layers=tuple((item.layer, item.weight) for item in profiles[teacher.id].critical_layers)
            if teacher.anchor
            else (),
        )
        for teacher in config.teachers
    )


# --- route, evaluate ----------------------------------------------------------------------------------------------------------


def route(session: Session) -> tuple[list[Path], Summary]:
    """Train and calibrate the router on the frozen student's embedding of pool prompts."""
    result = session.wait_for(session.student.train_router.remote(session.teacher_facts))
    session.reporter.line(f"router threshold: {result.reason}")
    # Without a threshold the network never decides; 1 says so in numbers.
    return [session.run.path / name for name in result.files], {
        "threshold": 1.0 if result.threshold is None else round(result.threshold, 3),
        "risk_upper_bound": 1.0 if result.risk is None else round(result.risk, 4),
    }


def evaluate(session: Session) -> tuple[list[Path], Summary]:
    """Score teachers and students on held-out rows."""
    from actors.evaluation import evaluate_run

    outputs, retention = evaluate_run(session)
    summary: Summary = {f"retention_{name}": round(value.retention, 3) for name, value in retention.items()}
    return outputs, summary


# --- export, report -----------------------------------------------------------------------------------------------------------


def export(session: Session) -> tuple[list[Path], Summary]:
    """Write the standalone bundle."""
    from actors.evaluation import export_run

    return export_run(session)


def report(session: Session) -> tuple[list[Path], Summary]:
    """Write metrics.json and the HTML report."""
    from actors.evaluation import write_metrics
    from nexus.assembly.report import load_report_data, write_report

    write_metrics(session)
    path = session.run.path / "report.html"
    write_report(load_report_data(session.run.path), path)
    return [path], {}


def _paths(texts: tuple[str, ...]) -> tuple[str, ...]:
    """Absolute paths: Ray's workers have another working directory."""
    return tuple(str(resolve_path(text).resolve()) for text in texts)
