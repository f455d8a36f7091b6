"""Specification of a job of stage one in plain values, which can be sent to other processes."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from coursepack.data import ViewRecipe, open_source
from coursepack.data.store.locations import path_or_address
from coursepack.data.store.owners import Part
from coursepack.device import pick_device
from coursepack.models import TeacherRunner, load_teacher, parse_tap
from coursepack.models.precision import has_precision
from coursepack.precompute.job import Job


@dataclass(frozen=True)
class PrecomputeSpec:
    """Plain values from which a process opens the source, loads the teacher and creates the job.

    Paths must refer to the same files in every process.
    """

    teacher: str
    """Teacher, as `run:FOLDER`, `run:FOLDER@EPOCH` or the name of a network."""
    source: str
    """Source, as `NAME[:SPLIT]`."""
    view: dict[str, Any]
    """All fields of the view recipe."""
    store: str
    views: int
    weights: str | None = None
    size: int | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None
    columns: tuple[int | None, ...] | None = None
    """Index of the teacher's class for each class of the source, None for one that it does not know."""
    root: str | None = None
    """Folder of the source's files."""
    taps: tuple[str, ...] = ()
    trust_code: bool = False
    device: str = "auto"
    precision: str = "float32"
    """Precision of the forward pass: `float32`, `tf32`, `float16` or `bfloat16`."""
    channels_last: bool = False
    compile: bool = False
    encoding: str = "float16"
    feature_encoding: str = "float16"
    batch_size: int = 256
    block_rows: int | None = None
    part: tuple[int, int] = (0, 1)
    """Index and count of the part."""
    views_per_load: int = 1
    workers: int | None = None
    single_writer: bool = False

    def job(self, *, elsewhere: bool = False) -> Job:
        """Open the source, load the teacher, and return the job.

        Args:
            elsewhere: whether other processes run the teacher. Then this one loads it on the CPU, if the
                precision allows that.

        Raises:
            CoursepackError: the source or the teacher cannot be opened, or they do not match.
        """
        root = None if self.root is None else Path(self.root)
        source = open_source(self.source, root)
        source.check()
        columns = None if self.columns is None else list(self.columns)
        network = load_teacher(
            self.teacher,
            source.class_names,
            weights=self.weights,
            size=self.size,
            mean=self.mean,
            std=self.std,
            columns=columns,
            trust_code=self.trust_code,
        )
        taps = [parse_tap(tap) for tap in self.taps]
        on_cpu = elsewhere and has_precision(self.precision, torch.device("cpu"))
        device = pick_device("cpu" if on_cpu else self.device)
        return Job(
            store=path_or_address(self.store),
            source=source,
            recipe=ViewRecipe.model_validate(self.view),
            runner=TeacherRunner(
                network,
                taps,
                device,
                columns,
                precision=self.precision,
                channels_last=self.channels_last,
                compiled=self.compile,
            ),
            views=self.views,
            encoding=self.encoding,
            feature_encoding=self.feature_encoding,
            batch_size=self.batch_size,
            block_rows=self.block_rows,
            part=Part(*self.part),
            views_per_load=self.views_per_load,
            workers=self.workers,
            root=root,
            single_writer=self.single_writer,
            spec=self,
        )
