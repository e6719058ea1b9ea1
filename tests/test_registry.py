"""Registries: who owns a name, what is imported when, and what an error says.

Plug-ins are real ones: each test writes modules and dist-info folders to a fresh place on the path.
"""

from __future__ import annotations

import gc
import sys
import threading
from abc import abstractmethod
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest

from hyperframe.component import AbstractComponent
from hyperframe.errors import (
    ArgumentError,
    ArgumentTypeError,
    PluginError,
    SpecError,
    UnknownComponentError,
)
from hyperframe.registry import Registry, RegistryEntry

GROUP = "hyperframe.test_detectors"


@dataclass(frozen=True, kw_only=True)
class AbstractToy(AbstractComponent):
    kind: ClassVar[str] = "detector"

    @abstractmethod
    def find(self) -> int: ...


@dataclass(frozen=True, kw_only=True)
class Alpha(AbstractToy):
    size: int = 4
    inner: Any = None

    def find(self) -> int:
        return self.size


@dataclass(frozen=True, kw_only=True)
class BetaLSH(AbstractToy):
    rate: float

    def find(self) -> int:
        return 0


@dataclass(frozen=True, kw_only=True)
class Stranger(AbstractComponent):
    kind: ClassVar[str] = "sampler"


HERE = f"{__name__}:"
CLASS_SOURCE = """
from dataclasses import dataclass
from {here} import AbstractToy

@dataclass(frozen=True, kw_only=True)
class {name}(AbstractToy):
    step: int = 1
    def find(self) -> int:
        return self.step
"""

Install = Callable[..., None]


@pytest.fixture
def registry() -> Registry[AbstractToy]:
    return Registry(
        kind="detector",
        group=GROUP,
        base=AbstractToy,
        builtins={"alpha": HERE + "Alpha", "beta_lsh": HERE + "BetaLSH"},
        aliases={"first": "alpha"},
    )


@pytest.fixture
def install(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Install]:
    monkeypatch.syspath_prepend(tmp_path)
    before = set(sys.modules)

    def make(distribution: str, name: str, target: str, source: str | None = None) -> None:
        info = tmp_path / f"{distribution.replace('-', '_')}-1.5.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(
            f"Metadata-Version: 2.1\nName: {distribution}\nVersion: 1.5\n"
        )
        (info / "entry_points.txt").write_text(f"[{GROUP}]\n{name} = {target}\n")
        if source is not None:
            module, _, cls = target.partition(":")
            text = source.replace("{here}", __name__).replace("{name}", cls)
            (tmp_path / f"{module}.py").write_text(text)

    yield make
    for name in set(sys.modules) - before:
        if str(getattr(sys.modules[name], "__file__", "")).startswith(str(tmp_path)):
            del sys.modules[name]


def the(registry: Registry[Any], name: str, origin: str = "plugin") -> RegistryEntry:
    (entry,) = [e for e in registry.entries() if (e.name, e.origin) == (name, origin)]
    return entry


# -- names and specs ------------------------------------------------------------------------------


def test_a_spec_makes_an_instance_and_an_instance_passes_through(
    registry: Registry[AbstractToy],
) -> None:
    assert registry.create("alpha") == Alpha()
    assert registry.create(" alpha(size=7) ") == Alpha(size=7)
    instance = Alpha(size=3)
    assert registry.create(instance) is instance
    assert registry.get("beta_lsh") is BetaLSH


def test_keywords_win_over_the_spec_and_over_an_instance(registry: Registry[AbstractToy]) -> None:
    assert registry.create("alpha(size=7)", size=9) == Alpha(size=9)
    assert registry.create(Alpha(size=7, inner=1), size=9) == Alpha(size=9, inner=1)
    assert registry.create("beta_lsh", rate=0.5) == BetaLSH(rate=0.5)


def test_an_alias_is_understood_and_not_listed(registry: Registry[AbstractToy]) -> None:
    assert registry.get("first") is Alpha
    assert registry.names() == ["alpha", "beta_lsh"]
    with pytest.raises(ArgumentError, match="an alias is a new name for a built-in"):
        Registry("detector", GROUP, AbstractToy, {}, aliases={"first": "alpha"})


@pytest.mark.parametrize(
    "component", [Alpha(), Alpha(size=2), BetaLSH(rate=0.25), Alpha(inner=(1, "x"))]
)
def test_create_undoes_to_spec(registry: Registry[AbstractToy], component: AbstractToy) -> None:
    assert registry.create(registry.to_spec(component)) == component


def test_a_component_is_written_under_the_name_it_is_registered_with(
    registry: Registry[AbstractToy],
) -> None:
    @dataclass(frozen=True, kw_only=True)
    class Gamma(Alpha):
        pass

    with pytest.raises(SpecError, match=r'no name among the detectors.*register\("gamma", Gamma\)'):
        registry.to_spec(Gamma())
    registry.register("zeta", Gamma)
    assert registry.to_spec(Gamma(size=5)) == "zeta(size=5)"
    registry.register("gamma", Gamma)
    assert registry.to_spec(Gamma(size=5)) == "gamma(size=5)"
    assert registry.to_spec(Alpha(inner=Gamma())) == "alpha(inner='gamma')"
    assert registry.to_spec(Alpha(inner=Stranger())) == "alpha(inner='stranger')"


@pytest.mark.parametrize(
    "spec,parts",
    [
        ("alpha(sise=3)", ["alpha", "no parameter 'sise'", "size, inner", "Did you mean 'size'?"]),
        ("beta_lsh", ["'rate' has no default", "beta_lsh(rate=...)"]),
        ("alpha(3)", ["'alpha(3)' at column 7", "positional"]),
    ],
)
def test_a_spec_that_does_not_fit_says_why(
    registry: Registry[AbstractToy], spec: str, parts: list[str]
) -> None:
    with pytest.raises(SpecError) as caught:
        registry.create(spec)
    for part in parts:
        assert part in str(caught.value)


def test_an_unknown_name_lists_what_exists_and_the_nearest(
    registry: Registry[AbstractToy],
) -> None:
    for ask in (registry.get, registry.create, registry.unregister):
        with pytest.raises(UnknownComponentError) as caught:
            ask("aplha")
        for part in ("detector='aplha'", "alpha, beta_lsh", "Did you mean 'alpha'?"):
            assert part in str(caught.value)
    with pytest.raises(UnknownComponentError, match=r"goes to create\(\)"):
        registry.get("alpha(size=3)")


def test_a_name_of_another_kind_gets_a_hint(registry: Registry[AbstractToy]) -> None:
    other = Registry("sampler", GROUP, Stranger, {"stranger": HERE + "Stranger"})
    with pytest.raises(UnknownComponentError, match="but there is a sampler; pass it as the"):
        registry.create("stranger")
    assert other.create("stranger") == Stranger()
    third = Registry("estimator", GROUP, Stranger, {"stranger": HERE + "Stranger"})
    both = r"there are an estimator and a sampler; pass it as the estimator or the sampler\. "
    with pytest.raises(UnknownComponentError, match=both):
        registry.create("stranger")
    del other
    gc.collect()
    with pytest.raises(UnknownComponentError, match="there is an estimator; pass it as the est"):
        registry.create("stranger")
    assert third.create("stranger") == Stranger()


@pytest.mark.parametrize(
    "spec,nearest",
    [
        ("beta-lsh", "beta_lsh"),
        ("Beta LSH(rate=0.5)", "beta_lsh"),
        ("alpha | beta-lsh", "beta_lsh"),
        ("'alpha'", "alpha"),
        ("fir-st", "first"),
        ("zebra-like", None),
        ("alpha(3)", None),
    ],
)
def test_a_near_miss_that_does_not_parse_is_answered_with_the_nearest_name(
    registry: Registry[AbstractToy], spec: str, nearest: str | None
) -> None:
    with pytest.raises(SpecError) as caught:
        registry.create(spec)
    first, shown, _ = str(caught.value).splitlines()
    assert first.endswith(f". Did you mean {nearest!r}?" if nearest else ".")
    assert shown == "    " + spec
    if nearest and "(" not in spec and "|" not in spec:
        with pytest.raises(UnknownComponentError, match=f"Did you mean '{nearest}'"):
            registry.get(spec)


@pytest.mark.parametrize(
    "value,pipe",
    [
        (("alpha", "beta_lsh(rate=1)"), '"alpha | beta_lsh(rate=1)"'),
        (["alpha"], '"alpha"'),
        ((Alpha(), "alpha"), '"a | b"'),
        ((), '"a | b"'),
    ],
)
def test_several_components_at_once_are_answered_with_the_pipe_where_there_is_a_union(
    registry: Registry[AbstractToy], value: Any, pipe: str
) -> None:
    with pytest.raises(ArgumentTypeError) as caught:
        registry.create(value)
    assert " is written " not in str(caught.value)
    registry.register("union", Alpha)
    with pytest.raises(ArgumentTypeError) as caught:
        registry.create(value)
    assert f"the union of several detectors is written {pipe}. Pass" in str(caught.value)


@pytest.mark.parametrize(
    "value,hint",
    [
        (Alpha, r"that is a class, not an instance; write Alpha\(\.\.\.\)"),
        (Stranger(), "that is a sampler"),
        (3, "that is an int"),
        (None, "that is a NoneType"),
    ],
)
def test_what_is_neither_text_nor_an_instance_is_refused(
    registry: Registry[AbstractToy], value: Any, hint: str
) -> None:
    with pytest.raises(ArgumentTypeError, match=hint) as caught:
        registry.create(value)
    assert "an instance of AbstractToy" in str(caught.value)
    with pytest.raises(ArgumentTypeError, match="pass the name of a detector"):
        registry.get(value)


# -- register -------------------------------------------------------------------------------------


def test_register_and_unregister_undo_each_other(registry: Registry[AbstractToy]) -> None:
    assert registry.register("gamma", Alpha) is Alpha
    registry.register("gamma", Alpha)  # the same class again changes nothing
    assert registry.create("gamma(size=2)") == Alpha(size=2)
    assert registry.names() == ["alpha", "beta_lsh", "gamma"]
    assert the(registry, "gamma", "registered").status == "ok"
    registry.unregister("gamma")
    assert registry.names() == ["alpha", "beta_lsh"]


def test_register_is_also_a_decorator(registry: Registry[AbstractToy]) -> None:
    @registry.register("delta")
    @dataclass(frozen=True, kw_only=True)
    class Delta(AbstractToy):
        def find(self) -> int:
            return 1

    assert registry.create("delta") == Delta()


def test_a_class_defined_again_takes_the_place_of_its_former_self(
    registry: Registry[AbstractToy],
) -> None:
    def cell() -> type[AbstractToy]:
        @registry.register("delta")
        @dataclass(frozen=True, kw_only=True)
        class Delta(AbstractToy):
            def find(self) -> int:
                return 1

        return Delta

    first, second = cell(), cell()
    assert first is not second
    assert registry.get("delta") is second
    with pytest.raises(ArgumentError, match="registered in this process"):
        registry.register("delta", Alpha)
    # the same place alone is not enough: a built-in name is never taken silently
    namesake: Any = dataclass(frozen=True, kw_only=True)(
        type("Alpha", (Alpha,), {"__module__": __name__, "__qualname__": "Alpha"})
    )
    with pytest.raises(ArgumentError, match="built-in detector"):
        registry.register("alpha", namesake)


def test_a_taken_name_names_both_owners_and_replace_takes_it_until_unregister(
    registry: Registry[AbstractToy],
) -> None:
    for name in ("alpha", "first"):
        with pytest.raises(ArgumentError) as caught:
            registry.register(name, BetaLSH)
        for part in (f"name={name!r}", "BetaLSH", "built-in detector", "lpha", "replace=True"):
            assert part in str(caught.value)
    registry.register("alpha", BetaLSH, replace=True)
    assert registry.get("alpha") is BetaLSH
    assert "alpha" in registry.names()
    assert the(registry, "alpha", "builtin").status == "duplicate"
    with pytest.raises(ArgumentError, match="registered in this process"):
        registry.register("alpha", Alpha)
    with pytest.raises(SpecError, match="no name"):
        registry.to_spec(Alpha())
    registry.unregister("alpha")
    assert registry.get("alpha") is Alpha
    with pytest.raises(ArgumentError, match="cannot be unregistered: it belongs to the built-in"):
        registry.unregister("alpha")


class Undecorated(Alpha):
    pass


@dataclass(frozen=True, kw_only=True)
class Reserved(Alpha):
    name: str = "x"  # type: ignore[misc]


@dataclass(frozen=True, kw_only=True, init=False)
class Starred(Alpha):
    def __init__(self, *sizes: int) -> None: ...


@dataclass(frozen=True, kw_only=True, init=False)
class Gathering(Alpha):
    def __init__(self, size: int = 4, **rest: Any) -> None: ...


@pytest.mark.parametrize(
    "cls,error,text",
    [
        (Alpha(), ArgumentTypeError, "is no class but has type Alpha"),
        (Stranger, ArgumentTypeError, "Stranger is no subclass of AbstractToy"),
        (int, ArgumentTypeError, "int is no subclass of AbstractToy"),
        (AbstractToy, ArgumentTypeError, "AbstractToy is abstract: it lacks find"),
        (Undecorated, ArgumentError, r"Undecorated is not a frozen dataclass; decorate it with"),
        (Reserved, ArgumentError, "has a parameter called 'name'"),
        (Starred, ArgumentError, r"Starred takes \*sizes, so that a misspelt parameter"),
        (Gathering, ArgumentError, r"Gathering takes \*\*rest, so .*leave out __init__"),
    ],
)
def test_a_class_that_cannot_serve_is_refused(
    registry: Registry[AbstractToy], cls: Any, error: type[Exception], text: str
) -> None:
    with pytest.raises(error, match=text):
        registry.register("gamma", cls)
    assert registry.names() == ["alpha", "beta_lsh"]


@pytest.mark.parametrize("name", ["my-detector", "a b", "", "1st", "for", "ä", "a(x=1)", 3])
def test_a_name_that_no_spec_could_hold_is_refused(
    registry: Registry[AbstractToy], name: Any
) -> None:
    with pytest.raises(ArgumentError, match="a spec string could not hold it"):
        registry.register(name, Alpha)


def test_the_owners_of_a_name_are_known_without_importing_them(
    registry: Registry[AbstractToy], install: Install
) -> None:
    assert registry.owners("gamma") == []
    assert registry.owners("alpha") == [f"the built-in detector {HERE}Alpha"]
    assert registry.owners("first") == ["the built-in detector 'alpha', as its alias"]
    install("rival-dist", "alpha", "rival_module:Rival", CLASS_SOURCE)
    registry.refresh()
    rival = "rival-dist 1.5 (entry point alpha = rival_module:Rival)"
    assert registry.owners("alpha") == [f"the built-in detector {HERE}Alpha", rival]
    assert "rival_module" not in sys.modules
    registry.register("gamma", Alpha)
    assert registry.owners("gamma") == [f"{HERE}Alpha (registered in this process)"]


# -- lazy imports ---------------------------------------------------------------------------------


def test_a_built_in_module_is_imported_when_asked_for_and_relative_to_the_package(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    package = tmp_path / "toy_package"
    package.mkdir()
    (package / "__init__.py").write_text("")
    (package / "part.py").write_text(
        CLASS_SOURCE.replace("{here}", __name__).replace("{name}", "Part")
    )
    monkeypatch.syspath_prepend(tmp_path)
    lazy: Registry[Any] = Registry(
        "detector",
        GROUP,
        HERE + "AbstractToy",
        {"part": ".part:Part", "missing": ".missing:Missing"},
        package="toy_package",
    )
    assert lazy.names() == ["missing", "part"]
    assert "toy_package.part" not in sys.modules
    part = lazy.create("part(step=3)")
    assert part.step == 3
    assert lazy.to_spec(part) == "part(step=3)"
    with pytest.raises(ModuleNotFoundError):
        lazy.get("missing")
    for name in ("toy_package", "toy_package.part"):
        monkeypatch.delitem(sys.modules, name)


# -- plug-ins -------------------------------------------------------------------------------------


def test_a_plugin_is_found_by_name_and_imported_only_when_asked_for(
    registry: Registry[AbstractToy], install: Install
) -> None:
    install("outside-dist", "outside", "outside_module:Outside", CLASS_SOURCE)
    assert registry.names() == ["alpha", "beta_lsh", "outside"]
    entry = the(registry, "outside")
    assert (entry.kind, entry.status, entry.reason) == ("detector", "not loaded", "")
    assert (entry.distribution, entry.version) == ("outside-dist", "1.5")
    assert "outside_module" not in sys.modules
    component = registry.create("outside(step=2)")
    assert "outside_module" in sys.modules
    assert component.find() == 2
    assert registry.get("outside") is type(component)
    assert the(registry, "outside").status == "ok"
    assert registry.to_spec(component) == "outside(step=2)"


def test_a_plugin_imported_past_the_registry_is_still_written_by_its_name(
    registry: Registry[AbstractToy], install: Install
) -> None:
    install("outside-dist", "elsewhere", "outside_module:Outside", CLASS_SOURCE)
    import outside_module  # type: ignore[import-not-found]

    assert registry.to_spec(outside_module.Outside(step=2)) == "elsewhere(step=2)"


def test_built_in_names_are_answered_without_reading_entry_points(
    registry: Registry[AbstractToy], monkeypatch: pytest.MonkeyPatch
) -> None:
    def never(group: str) -> Any:
        raise RuntimeError("the entry points were read")

    monkeypatch.setattr("hyperframe.registry.read_plugins", never)
    registry.register("gamma", Alpha)
    assert registry.create("alpha") == Alpha()
    assert registry.create("gamma") == Alpha()
    assert registry.to_spec(Alpha()) == "gamma"
    with pytest.raises(RuntimeError, match="were read"):
        registry.get("unknown")


def test_entry_points_are_read_once_and_refresh_reads_them_again(
    registry: Registry[AbstractToy], install: Install
) -> None:
    assert registry.names() == ["alpha", "beta_lsh"]
    install("late-dist", "late", "late_module:Late", CLASS_SOURCE)
    assert registry.names() == ["alpha", "beta_lsh"]
    registry.refresh()
    assert registry.names() == ["alpha", "beta_lsh", "late"]


BROKEN = {
    "the module fails": ("bad:Bad", "raise RuntimeError('no luck')", "RuntimeError: no luck"),
    "the module is absent": ("bad:Bad", None, "ModuleNotFoundError: No module named 'bad'"),
    "the class is absent": ("bad:Bad", "", "AttributeError"),
    "it is no subclass": ("bad:Bad", "class Bad: pass", "Bad is no subclass of AbstractToy"),
    "the module exits": ("bad:Bad", "raise SystemExit(2)", "SystemExit: 2"),
    "it is no class": ("bad:Bad", "Bad = 3", "3 is no class but has type int"),
}


@pytest.mark.parametrize("case", sorted(BROKEN))
def test_a_broken_plugin_raises_only_when_asked_for_and_hides_nothing(
    registry: Registry[AbstractToy], install: Install, case: str
) -> None:
    target, source, cause = BROKEN[case]
    install("bad-dist", "bad", target, source)
    install("good-dist", "good", "good_module:Good", CLASS_SOURCE)
    assert registry.names() == ["alpha", "bad", "beta_lsh", "good"]  # nobody has asked yet
    for _ in range(2):
        with pytest.raises(PluginError) as caught:
            registry.create("bad")
        for part in ("'bad'", "bad-dist 1.5", f"entry point bad = {target}", cause, "uninstall"):
            assert part in str(caught.value)
        assert caught.value.__cause__ is not None
        assert ".." not in str(caught.value)
    assert registry.names() == ["alpha", "beta_lsh", "good"]
    assert the(registry, "bad").status == "broken"
    assert cause in the(registry, "bad").reason
    assert registry.create("good").find() == 1
    assert registry.create("alpha") == Alpha()


def test_listing_with_load_tries_every_plugin_and_never_raises(
    registry: Registry[AbstractToy], install: Install
) -> None:
    install("bad-dist", "bad", "bad:Bad", "raise RuntimeError('no luck')")
    install("good-dist", "good", "good_module:Good", CLASS_SOURCE)
    install("odd-dist", "odd-name", "odd_module:Odd", CLASS_SOURCE)
    statuses = {entry.name: entry.status for entry in registry.entries(load=True)}
    assert statuses == {
        "alpha": "ok",
        "bad": "broken",
        "beta_lsh": "ok",
        "good": "ok",
        "odd-name": "broken",
    }
    assert "not a plain name" in the(registry, "odd-name").reason


def test_a_plugin_name_that_no_spec_can_hold_is_broken_at_once(
    registry: Registry[AbstractToy], install: Install
) -> None:
    install("odd-dist", "odd-name", "odd_module:Odd", CLASS_SOURCE)
    assert registry.names() == ["alpha", "beta_lsh"]
    entry = the(registry, "odd-name")
    assert entry.status == "broken"
    assert "'odd-name' is not a plain name" in entry.reason
    assert "odd_module" not in sys.modules
    with pytest.raises(PluginError, match="'odd-name' is not a plain name"):
        registry.get("odd-name")


def test_a_plugin_is_never_written_under_a_name_that_create_cannot_read(
    registry: Registry[AbstractToy], install: Install
) -> None:
    install("odd-dist", "bad-name", "outside_module:Outside", CLASS_SOURCE)
    import outside_module

    component = outside_module.Outside(step=2)
    with pytest.raises(SpecError, match="has no name among the detectors"):
        registry.to_spec(component)
    for distribution, name in (("a-dist", "elsewhere"), ("b-dist", "outside")):
        install(distribution, name, "outside_module:Outside")
        registry.refresh()
        assert registry.to_spec(component) == f"{name}(step=2)"  # at last, its own name
        assert registry.create(registry.to_spec(component)) == component


def test_a_repaired_plugin_works_without_a_new_process(
    registry: Registry[AbstractToy], install: Install, tmp_path: Path
) -> None:
    install("bad-dist", "bad", "bad:Bad", None)
    with pytest.raises(PluginError):
        registry.get("bad")
    (tmp_path / "bad.py").write_text(
        CLASS_SOURCE.replace("{here}", __name__).replace("{name}", "Bad")
    )
    registry.refresh()
    assert registry.create("bad").find() == 1
    assert the(registry, "bad").status == "ok"


def test_two_plugins_with_one_name_are_an_error_that_names_both_only_when_asked_for(
    registry: Registry[AbstractToy], install: Install
) -> None:
    install("one-dist", "twin", "one_module:One", CLASS_SOURCE)
    install("two-dist", "twin", "two_module:Two", CLASS_SOURCE)
    assert registry.names() == ["alpha", "beta_lsh"]
    entries = [entry for entry in registry.entries(load=True) if entry.name == "twin"]
    assert [entry.status for entry in entries] == ["duplicate", "duplicate"]
    assert "two-dist" in entries[0].reason
    assert "one-dist" in entries[1].reason
    with pytest.raises(PluginError) as caught:
        registry.create("twin")
    for part in ("one-dist 1.5", "two-dist 1.5", "one_module:One", "register('twin', cls)"):
        assert part in str(caught.value)
    assert not {"one_module", "two_module"} & set(sys.modules)
    registry.register("twin", Alpha)
    assert registry.create("twin") == Alpha()


@pytest.mark.parametrize("name", ["alpha", "first", "gamma"])
def test_a_plugin_never_takes_a_built_in_or_registered_name(
    registry: Registry[AbstractToy], install: Install, name: str
) -> None:
    registry.register("gamma", Alpha)
    install("rival-dist", name, "rival_module:Rival", CLASS_SOURCE)
    assert registry.get(name) is Alpha
    entry = the(registry, name)
    assert entry.status == "duplicate"
    assert "built-in detector" in entry.reason or "registered" in entry.reason
    assert registry.names() == ["alpha", "beta_lsh", "gamma"]
    assert "rival_module" not in sys.modules


def test_many_threads_agree_on_one_class(registry: Registry[AbstractToy], install: Install) -> None:
    install("outside-dist", "outside", "outside_module:Outside", CLASS_SOURCE)
    found: list[type[AbstractToy]] = []
    threads = [
        threading.Thread(target=lambda: found.append(registry.get("outside"))) for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(found) == 8
    assert len(set(found)) == 1
