"""Unfinished moves are completed or reverted before anything else begins: one function, called by every step that
moves traffic or relies on the champion, and by the watchdog.

| open move | champion | what happens |
| --- | --- | --- |
| rollback | unchanged, or already the target | completed |
| rollout, evidence recorded | the challenger: it is released | completed: traffic, tags, aliases |
| rollout or trial, rejected | | aliases and servers as before; the rejection was recorded first |
| rollout or trial, any other | unchanged | traffic back to the champion, `previous` as before |
| any | another version: a person moved the alias | traffic to the champion; no alias is changed |
"""

import logging
import time
from collections.abc import Callable
from typing import TYPE_CHECKING

from slipstream.contract import Release, Verdict, combine
from slipstream.errors import RegistryError, SlipstreamError, Superseded, Unavailable
from slipstream.release import moves, rejections
from slipstream.release.moves import Entry, Move
from slipstream.release.releases import sweep
from slipstream.store.registry import CHALLENGER, CHAMPION, PREVIOUS, RELEASED_BY, REPLACED, Registry
from slipstream.store.tracking import fetch
from slipstream.traffic.base import Routes, TrafficController

if TYPE_CHECKING:  # needs numpy, which the watchdog does not load
    from slipstream.traffic.guarded import Stage

log = logging.getLogger(__name__)

POLL_S = 1.0
EVERY_KIND = ("trial", "rollout", "rollback", "rebuild", "serve")


def settle(
    registry: Registry,
    connect: Callable[[], TrafficController],
    *,
    wait_for: tuple[str, ...] = EVERY_KIND,
    preempt: tuple[str, ...] = (),
) -> None:
    """Return when no move is open: it was completed, or reverted.

    A move whose process is alive is waited for if its kind is in `wait_for`, superseded at once if it is in `preempt`,
    and otherwise left alone. `connect` is called only if there is something to do. Raise Unavailable.
    """
    waited = False
    while (entry := moves.newest(registry)) is not None and entry.open:
        if entry.live(time.time()) and entry.kind not in preempt:
            if entry.kind not in wait_for:
                return
            if not waited:
                log.info("%s: waiting for the %s by %s", registry.model, entry.kind, entry.by)
            waited = True
            time.sleep(POLL_S)
            continue
        try:
            finish(registry, connect(), entry)
        except Superseded as error:
            log.info("%s: %s", registry.model, error)


def finish(registry: Registry, controller: TrafficController, entry: Entry) -> None:
    """Supersede an open move, and complete it or restore the traffic."""
    with moves.take_over(registry, controller, entry) as move:
        entry, champion = move.entry, registry.champion()
        if not entry.open:
            move.close(entry.state)
        elif entry.kind == "rollback" and champion in (entry.champion, entry.to):
            try:
                finish_rollback(move)
            except SlipstreamError as error:
                if move.entry.open:
                    raise
                log.warning("%s: the rollback is given up: %s", registry.model, error)
        elif entry.state == "promoting" and champion == entry.to:
            finish_release(move)
        elif entry.state == "refused":
            revert(move)
        else:
            put_back(move)
    log.info("%s: the %s by %s was not done; it is %s now", registry.model, entry.kind, entry.by, move.entry.state)


def put_back(move: Move) -> None:
    """End a move without changes: all traffic to the champion, `previous` as it was."""
    _as_before(move)
    move.close("put back")


def abort(move: Move, stage: "Stage") -> None:
    """End a move after an error: first the traffic, without querying MLflow, then everything else if MLflow answers."""
    stage.put_back()
    try:
        put_back(move)
    except SlipstreamError as error:
        log.warning("%s: the next step or the watchdog ends this %s: %s", stage.model, move.entry.kind, error)


def refuse(move: Move, verdicts: tuple[Verdict, ...], record: Callable[[], object]) -> None:
    """End a test or rollout whose verdicts do not pass. Raise Unavailable while the traffic cannot be restored.

    The rejection comes first, so that no later failure or kill loses it. `record` keeps the evidence; the rejection is
    final without it.
    """
    entry = move.entry
    assert entry.to is not None
    if combine(verdicts) == "fail":
        rejections.reject(move.registry, entry.to, entry.kind, rejections.reasons(verdicts), entry.by)
    short = tuple(v.model_copy(update={"reason": v.reason[:500]}) for v in verdicts)
    move.update(state="refused", verdicts=short)
    try:
        record()
    except Exception as error:
        log.warning("%s: the evidence of the refusal could not be kept: %s", move.registry.model, error)
    revert(move)


def revert(move: Move) -> None:
    """Complete a rejection: traffic and aliases as before, and the challenger's server stopped."""
    entry = move.entry
    assert entry.to is not None
    _as_before(move)
    if move.registry.alias(CHALLENGER) == entry.to:
        move.set_alias(CHALLENGER, None)
    move.close("reverted")
    try:
        move.controller.retire(move.registry.release(entry.to))
    except Unavailable as error:
        log.warning("%s: a server stays until the next run retires it: %s", move.registry.model, error)


def finish_release(move: Move) -> None:
    """Complete what follows the champion alias: all traffic, audit tags, aliases, servers. Raise RegistryError.

    If a person moved the alias meanwhile, the traffic follows it.
    """
    registry, entry = move.registry, move.entry
    version = str(entry.to)
    _require_champion(move, version)
    give_traffic(move, version, entry.back)
    move.tag(
        version,
        {
            RELEASED_BY: entry.by,
            "slipstream.released_at": moves.now_iso(),
            REPLACED: entry.champion or "",
        },
    )
    if registry.alias(CHALLENGER) == version:
        move.set_alias(CHALLENGER, None)
    move.close("done")
    sweep(move.controller, registry)
    verify(move)


def finish_rollback(move: Move) -> None:
    """Move the traffic, then the aliases. A target that does not start is given up unless traffic has moved."""
    registry, entry = move.registry, move.entry
    leave, target = str(entry.champion), str(entry.to)
    release = registry.release(target)
    try:
        _unsplit(move.controller, registry.release(leave), release)
        artifact = registry.artifact(target)
        move.controller.deploy(release, fetch(artifact), artifact.sha256)
    except Superseded:
        raise
    except SlipstreamError:
        if release.name not in move.controller.routes(registry.model).weights and registry.champion() == leave:
            move.close("given up")
        raise
    rejections.reject(registry, leave, "rollback", entry.reason or "rolled back", entry.by)
    move.controller.set_routes(registry.model, Routes(weights={release.name: 100}))
    move.tag(leave, {"slipstream.rolled_back_at": moves.now_iso(), "slipstream.rolled_back_by": entry.by})
    move.set_alias(CHAMPION, target)
    move.set_alias(PREVIOUS, entry.then_previous)
    move.close("done")
    verify(move)
    log.info("rollback: %s serves version %s instead of %s", registry.model, target, leave)


def rollback_target(registry: Registry, leave: str, *also_refused: str) -> str | None:
    """Return the last release before `leave` that is not rejected, or None.

    The alias `previous` comes first, then what each release replaced. `also_refused` are digests. Versions that were
    deleted, or whose engine slipstream did not sign, are excluded.
    """
    refused = {*rejections.active(registry), *also_refused, digest_of(registry, leave)}
    queue, visited = [registry.alias(PREVIOUS), leave], {leave}
    while queue:
        version = queue.pop(0)
        sha256 = digest_of(registry, version) if version else None
        if version is None or sha256 is None:
            continue
        if version not in visited and sha256 not in refused:
            return version
        visited.add(version)
        if (replaced := registry.tags(version).get(REPLACED)) not in visited:
            queue.append(replaced)
    return None


def digest_of(registry: Registry, version: str) -> str | None:
    """Return the digest of a version's engine; None for one that cannot be deployed."""
    try:
        return registry.artifact(version).sha256
    except RegistryError as error:
        log.warning("%s is no rollback target: %s", registry.release(version).key, error)
        return None


def verify(move: Move) -> None:
    """Compare aliases and traffic with what the move decided, after it is recorded as closed.

    A superseded process may have written once more before its check; that write is repaired here. Raise RegistryError
    if a person moved the champion, after the traffic has followed.
    """
    champion, _ = move.entry.decided
    assert champion is not None
    _require_champion(move, champion)
    routes = Routes(weights={move.registry.release(champion).name: 100})
    if move.controller.routes(move.registry.model) != routes:
        move.controller.set_routes(move.registry.model, routes)
    move.check()


def give_traffic(move: Move, version: str | None, back: str) -> None:
    """Give all traffic to a version, or to the release `back` if there is no version; deploy it if necessary."""
    registry, controller = move.registry, move.controller
    release = registry.release(version) if version else Release(model=registry.model, name=back)
    if version and release.name not in controller.releases(registry.model):
        artifact = registry.artifact(version)
        controller.deploy(release, fetch(artifact), artifact.sha256)
    if version or release.name in controller.releases(registry.model):  # else nothing was ever deployed
        controller.set_routes(registry.model, Routes(weights={release.name: 100}))


def _as_before(move: Move) -> None:
    registry, entry = move.registry, move.entry
    champion = registry.champion()
    give_traffic(move, champion, entry.back)
    if champion == entry.champion and entry.kind == "rollout" and registry.alias(PREVIOUS) == entry.champion:
        move.set_alias(PREVIOUS, entry.previous)


def _require_champion(move: Move, version: str) -> None:
    champion = move.registry.champion()
    if champion == version:
        return
    move.check()
    give_traffic(move, champion, move.entry.back)
    if move.entry.open:
        move.close("put back")
    raise RegistryError(
        f"{move.registry.model}@champion was moved to version {champion} while a {move.entry.kind} made version "
        f"{version} the champion; it was left there, and the traffic follows it. `slipstream rollback` goes back"
    )


def _unsplit(controller: TrafficController, source: Release, target: Release) -> None:
    """Give `source` all traffic that is split with a third release: KServe supports at most two."""
    weights = controller.routes(source.model).weights
    if len(weights) > 1 and source.name in weights and target.name not in weights:
        controller.set_routes(source.model, Routes(weights={source.name: 100}))
