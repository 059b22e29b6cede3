"""From a cluster, or this machine alone, to :class:`raydmd.doctor.facts.Facts`."""

from __future__ import annotations

import dataclasses
import os
import uuid
from typing import TYPE_CHECKING

import ray

from raydmd.doctor.facts import Facts, Folder, NodeFacts
from raydmd.doctor.nodes import Cluster, node_facts, own_header, refuses, try_storage
from raydmd.doctor.probe import Probe
from raydmd.doctor.room import need_of
from raydmd.doctor.services import ask_tracking
from raydmd.errors import InputError
from raydmd.serving.top import join
from raydmd.training.cluster import lasting
from raydmd.training.room import check_room, grows, living_nodes

if TYPE_CHECKING:
    from raydmd.recipe import Recipe


def gather(address: str, recipe: Recipe | None, deadline: float) -> Facts:
    """Look at a cluster; at this machine alone without one. Every question has a deadline.

    Args:
        address: of the cluster, ``auto`` for the newest of this machine; empty: this machine alone.
        recipe: a run that is planned there; its folders, storage and tracking server are looked at too.
        deadline: seconds for each question.
    """
    tracking = ask_tracking(recipe.tracking.uri, deadline) if recipe else None
    folders = folders_of(recipe) if recipe else []
    storage = recipe.checkpoints.storage if recipe else None
    need = need_of(recipe) if recipe else None
    if not address:
        return Facts(nodes=(_alone(folders, storage),), tracking=tracking, need=need)
    asks = refuses(address)
    if asks and refuses(address, own_header()):  # Ray would ask again for long
        said = f"the Ray cluster at {address} refuses the token that this process has, if any"
        return Facts(address=address, joined=said, asks_token=True, tracking=tracking)
    try:
        join(address)
    except InputError as error:
        return Facts(address=address, joined=str(error), asks_token=asks, tracking=tracking)
    try:
        found = Cluster(deadline).look(folders, inputs_of(recipe) if recipe else [], storage)
        room, may_come = _room(recipe), bool(recipe and grows(recipe))
        return dataclasses.replace(found, address=address, tracking=tracking, room=room, grows=may_come, need=need)
    finally:
        ray.shutdown()


def folders_of(recipe: Recipe) -> list[str]:
    """Folders that all nodes must see: a run's own, and its cache's."""
    found = [lasting(recipe.output)]
    if recipe.data.cache:
        found.append(recipe.data.cache.expanduser().absolute())
    return [str(path) for path in dict.fromkeys(found)]


def inputs_of(recipe: Recipe) -> list[str]:
    """Files and folders of this machine that a recipe names: its model, its rewards, its prompts."""
    named = [recipe.model.path, *recipe.model.lora.values(), str(recipe.data.prompts or "")]
    named += [reward.path or "" for reward in recipe.method.adapt.rewards] if recipe.method.adapt else []
    # Not names of the hub and of the zoo, which each node finds by itself.
    return [
        path for path in map(os.path.expanduser, filter(None, named)) if os.path.isabs(path) and os.path.exists(path)
    ]


def _alone(folders: list[str], storage: str | None) -> NodeFacts:
    here, mark, name = Probe(), uuid.uuid4().hex[:8], "here"
    found = []
    for path in folders:
        told = here.write(path, mark, name)
        made = told.pop("made")
        found.append(Folder(**told, made=made, sees=tuple(here.sees(path, mark, 0, 0.0))))
        here.erase(path, mark, name)
        here.tidy(path, made)
    checkpoints = try_storage(storage) if storage else None
    return node_facts(name, here.look(), folders=tuple(found), checkpoints=checkpoints)


def _room(recipe: Recipe | None) -> str | None:
    if recipe is None:
        return None
    try:
        check_room(recipe, living_nodes())
    except InputError as error:
        return str(error)
    return ""
