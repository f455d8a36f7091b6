"""Construction of students and objectives from recipes and methods."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from coursepack.data.store import load_manifest
from coursepack.distill.losses.base import BuildContext, TeacherHead
from coursepack.distill.objective import Objective
from coursepack.distill.recipe import resolve_objective
from coursepack.distill.setup.requirements import (
    check_needs,
    logits_read,
    needed_arrays,
    shaped_pairs,
    term_pairs,
)
from coursepack.distill.setup.student import last_map, probe_student
from coursepack.distill.setup.teacher import accuracy
from coursepack.distill.setup.wrap import check_wrapped, teacher_head
from coursepack.errors import RecipeError
from coursepack.models import build_network, load_teacher
from coursepack.models.build import RUN
from coursepack.models.load import classes_of_run, reload_teacher

STORE = "store"
"""Prefix of a peer that starts from the teacher of a store: `store:PATH`."""

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

    from coursepack.data import Source
    from coursepack.data.randomness import Samples
    from coursepack.data.store import StoreReader
    from coursepack.distill.objective_config import ObjectiveConfig
    from coursepack.distill.recipe import TrainRecipe
    from coursepack.distill.targets.teacher_stores import TeacherStores
    from coursepack.models import Network


def build_student(recipe: TrainRecipe, source: Source, *, trust_code: bool = False) -> Network:
    """Build the recipe's student with newly initialized weights, or a peer with the weights it starts from.

    Raises:
        UnknownName: the network does not exist.
        RecipeError: the network cannot be built with the recipe's size, mean or std.
        UntrustedCode: a peer's run or store names Python code, and `trust_code` is false.
    """
    pixels: dict[str, Any] = {
        "size": recipe.student_size,
        "mean": recipe.student_mean,
        "std": recipe.student_std,
    }
    kind, _, path = recipe.student.partition(":")
    if recipe.member and kind == RUN:
        _check_classes(recipe.student, source)
        return load_teacher(recipe.student, source.class_names, trust_code=trust_code, **pixels)
    if recipe.member and kind == STORE:
        return _stored_teacher(path, source, trust_code=trust_code)
    return build_network(recipe.student, len(source.class_names), seed=recipe.own_seed, **pixels)


def starts_trained(peer: str) -> bool:
    """Return true if a peer starts from the weights of a run or a store."""
    return peer.partition(":")[0] in (RUN, STORE)


def _check_classes(peer: str, source: Source) -> None:
    classes, expected = classes_of_run(peer), len(source.class_names)
    if classes != expected:
        raise RecipeError(
            f"peer {peer!r} has {classes} classes, but the source has {expected}: students that learn from "
            "each other have the same classes, so name a run that was trained on them, or a network"
        )


def _stored_teacher(path: str, source: Source, *, trust_code: bool) -> Network:
    """Load the teacher of a store, as the network that a peer starts from."""
    manifest = load_manifest(path)
    teacher = manifest.identity["teacher"]
    if teacher.get("columns") is not None:
        raise RecipeError(
            f"the teacher of store {path!r} has other classes than the store, so it cannot be trained on "
            "them: name another peer"
        )
    network = reload_teacher(
        teacher,
        source.class_names,
        manifest.origin.get("weights_file"),
        holder=f"store {path!r}",
        trust_code=trust_code,
    )
    runs = getattr(network.module, "opaque", None)
    if isinstance(runs, str):
        raise RecipeError(
            f"the teacher of store {path!r} is run by {runs} as it was exported, so it cannot be trained: "
            "name another peer, or learn from the store itself with --store"
        )
    return network


def make_objective(
    stores: TeacherStores,
    student: Network,
    method: str,
    changes: Mapping[str, Any] | None = None,
    *,
    seed: int = 0,
    epochs: int = 0,
) -> Objective:
    """Build a method's objective for a student and the teachers of some stores.

    Args:
        stores: the teachers' stores.
        student: the network to train.
        method: a name in `METHODS`.
        changes: fields of its `ObjectiveConfig` to replace, for example `{"temperature": 2.0}`.
        seed: seed for initial adapters and latents, and for random teachers.
        epochs: number of epochs of the training, which fusion `sequence` divides; 0 if it is not known.

    Raises:
        UnknownName: the method, or a layer of the student, does not exist.
        RecipeError: a field does not exist, a value does not fit the stores, the method is for several
            students, or features are not stored; in that case, the message has the command that adds them.
    """
    classes = len(stores.source.class_names)
    config = resolve_objective(method, changes or {}, f"method {method!r}", classes=classes)
    if config.needs().peers:
        raise RecipeError(
            f"method {method!r} is for students that learn from each other, but this objective is for one: "
            "train them with `distill train` or `coursepack.distill.train`, or choose another method"
        )
    check_needs(method, config, stores.readers, stores.view, stores.root)
    return build_objective(
        config,
        student,
        stores.source,
        stores.readers,
        method=method,
        root=stores.root,
        seed=seed,
        epochs=epochs,
    )


def build_objective(
    config: ObjectiveConfig,
    student: Network,
    source: Source,
    readers: Sequence[StoreReader],
    *,
    method: str,
    root: str | None,
    seed: int,
    samples: Samples | None = None,
    epochs: int = 0,
) -> Objective:
    """Build an objective for a student from a config that has passed `check_needs`.

    Raises:
        UnknownName: a layer does not exist in the student.
        RecipeError: features are not stored or cannot be compared, or the student has no usable embedding.
    """
    check_wrapped(config, student, method)
    needs = config.needs()
    teachers = [reader.manifest for reader in readers]
    pairs = term_pairs(config, teachers, student)
    needed_arrays(method, readers, pairs, logits=logits_read(config, teachers), root=root)
    width = 0
    if needs.embedding:
        layer = needs.embedding_layer
        width = probe_student(student, source.channels, embedding=True, embedding_layer=layer).embedding_width
    context = BuildContext(
        teachers=max(1, len(readers)),
        classes=len(source.class_names),
        known=tuple(reader.manifest.known_classes for reader in readers),
        accuracies=tuple(accuracy(reader.manifest) for reader in readers),
        embedding_width=width,
        heads=tuple(TeacherHead(*teacher_head(reader)) for reader in readers) if needs.teacher_heads else (),
        labels=source.labels,
        samples=samples,
        pairs_by_term=shaped_pairs(config, pairs, readers, student, source.channels, root),
        last_map=last_map(student, source.channels) if needs.last_map else "",
        seed=seed,
        epochs=epochs,
    )
    return Objective(config, context)


def read_arrays(
    recipe: TrainRecipe, source: Source, readers: Sequence[StoreReader], *, trust_code: bool = False
) -> list[list[str]]:
    """Return the names of the arrays that a recipe's objective reads from each store.

    Raises:
        RecipeError: an array is not stored; the message has the command that adds it.
    """
    objective, teachers, pairs = recipe.objective, [reader.manifest for reader in readers], {}
    if objective.needs().pairs is not None:
        pairs = term_pairs(objective, teachers, build_student(recipe, source, trust_code=trust_code))
    logits = logits_read(objective, teachers)
    return needed_arrays(recipe.method, readers, pairs, logits=logits, root=recipe.root)
