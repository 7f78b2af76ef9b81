"""Settings are checked where they are made, and every preset that ships is valid."""

import pytest
import yaml

from fastedit.config import Config, WrongSettings, changed, check_changes, layer_list, layers_in_short, parse_changes
from fastedit.methods.closed_form.config import ClosedFormConfig, NSEConfig, TemplateConfig, ValueConfig
from fastedit.methods.columns.config import KNEConfig
from fastedit.methods.meg.config import CONFIGS, MegConfig
from fastedit.methods.presets import load_preset, presets
from fastedit.methods.registry import METHODS

PRESETS = [(method, name) for method in METHODS for name in presets(method)]


@pytest.mark.parametrize(("method", "name"), PRESETS)
def test_a_preset_loads_and_says_what_it_was_made_for(method, name):
    config = load_preset(method, name)
    assert isinstance(config, METHODS[method].config_class)
    text = (METHODS[method].presets / f"{name}.yaml").read_text(encoding="utf-8")
    data = yaml.safe_load(text)
    assert set(data) == {"origin", "model", "config"}
    assert data["origin"]
    assert {"n_layers", "d_model", "d_ff", "model_type", "vocab_size", "n_heads"} <= set(data["model"])
    if data["model"]["model_type"] == "llama":
        assert {"n_kv_heads", "rope_theta"} <= set(data["model"])
    if isinstance(config, ClosedFormConfig):
        assert max(config.layers) < data["model"]["n_layers"]
    for field, value in data["config"].items():
        if isinstance(value, int | float):
            assert getattr(config, field) == value


def test_every_file_among_the_presets_is_a_preset_of_a_method():
    packages = {method.presets.parent for method in METHODS.values()}
    found = sorted((file.parent.name, file.stem) for package in packages for file in package.glob("*/*"))
    assert found == sorted(PRESETS)
    assert ("nse", "smollm2-135m") in found


def test_changes_override_the_preset():
    config = load_preset("nse", "smollm2-135m", rounds=5, value={"steps": 3})
    assert (config.rounds, config.value.steps) == (5, 3)
    assert config.layers == load_preset("nse", "smollm2-135m").layers


def test_an_unknown_field_is_named():
    with pytest.raises(ValueError, match="layres"):
        load_preset("nse", "smollm2-135m", layres=[1])
    with pytest.raises(ValueError, match=r"value\.stpes"):
        load_preset("nse", "smollm2-135m", value={"stpes": 3})


@pytest.mark.parametrize("layers", [[], [3, 2], [1, 1], [-1, 2], ["a"], None])
def test_bad_layers_are_refused_by_name(layers):
    with pytest.raises(ValueError, match="layers"):
        NSEConfig(layers=layers, covariance_weight=1)


@pytest.mark.parametrize(
    ("field", "value"),
    [("mass", 0), ("mass", 1.01), ("rounds", 0), ("covariance_weight", 0), ("covariance_weight", "much")],
)
def test_values_out_of_range_are_refused_by_name(field, value):
    with pytest.raises(ValueError, match=field):
        NSEConfig(**{"layers": [1], "covariance_weight": 1, field: value})


@pytest.mark.parametrize(
    ("kind", "field", "value"),
    [
        (ValueConfig, "steps", 1),
        (ValueConfig, "lr", 0),
        (ValueConfig, "clamp", -1),
        (ValueConfig, "stop_after_top1", 0),
        (TemplateConfig, "length", 1),
    ],
)
def test_parts_check_their_own_fields(kind, field, value):
    with pytest.raises(ValueError, match=field):
        kind(**{field: value})


def test_a_config_cannot_be_changed():
    config = load_preset("nse", "smollm2-135m")
    with pytest.raises(ValueError, match="frozen"):
        config.rounds = 3


def test_an_unknown_preset_or_method_lists_what_there_is():
    with pytest.raises(ValueError, match=r"'nonsense'; there are .*smollm2-135m"):
        load_preset("nse", "nonsense")
    with pytest.raises(ValueError, match=r"one of .*nse.*'nonsense'"):
        load_preset("nonsense", "smollm2-135m")


def test_a_change_leaves_the_rest_of_its_part_as_it_is():
    config = load_preset("nse", "smollm2-135m")
    other = changed(config, {"value": {"steps": 7}})
    assert other.value == config.value.model_copy(update={"steps": 7})
    assert other.moments == config.moments


def test_assignments_become_changes():
    found = parse_changes(["rounds=2", "value.steps=10", "value.lr=1e-1", "memory=true", "layers=[1, 2]"])
    assert found == {"rounds": 2, "value": {"steps": 10, "lr": "1e-1"}, "memory": True, "layers": [1, 2]}
    assert changed(load_preset("nse", "smollm2-135m"), {"value": {"lr": "1e-1"}}).value.lr == 0.1


@pytest.mark.parametrize("wrong", ["rounds", "=2", "value.=3", ".steps=3"])
def test_a_setting_without_a_name_is_refused(wrong):
    with pytest.raises(ValueError, match="must look like"):
        parse_changes([wrong])


def test_a_part_set_as_a_whole_and_in_detail_is_refused():
    with pytest.raises(ValueError, match="set twice"):
        parse_changes(["value=3", "value.steps=3"])


# One sentence for each problem: the setting, what was wanted, what was given.
PROBLEMS = [
    ({"rounds": 0}, "rounds must be a whole number, at least 1, got 0"),
    ({"rounds": True}, "rounds must be a whole number, at least 1, got True"),
    ({"rounds": {"x": 1}}, "rounds must be a whole number, at least 1, got {'x': 1}"),
    ({"mass": float("nan")}, "mass must be a finite number, above 0 and at most 1, got nan"),
    ({"value": {"lr": float("inf")}}, "value.lr must be a finite number, above 0, got inf"),
    ({"covariance_weight": float("inf")}, "covariance_weight must be a finite number, above 0, got inf"),
    ({"residual_min": float("inf")}, "residual_min must be a finite number, at least 0, got inf"),
    ({"residual_max": float("nan")}, "residual_max must be a number, above 0, got nan"),
    ({"value": {"lr": "fast"}}, "value.lr must be a number, above 0, got 'fast'"),
    ({"value": {"dtype": "float64"}}, "value.dtype must be one of auto, model, float32, bfloat16, got 'float64'"),
    ({"value": {"stop_after_top1": 0}}, "value.stop_after_top1 must be a whole number or null, at least 1, got 0"),
    ({"as_released": "maybe"}, "as_released must be true or false, got 'maybe'"),
    ({"templates": {"seeds": "The"}}, "templates.seeds must be a list of texts, got 'The'"),
    ({"layers": "8-4"}, "layers must be a list of layers (4-8 or 4,6,8), got '8-4'"),
    ({"layers": []}, "layers must be a list of layers (4-8 or 4,6,8), got []"),
    ({"layers": [3, 2]}, "layers must be ascending, without repeats, from 0 on, got [3, 2]"),
    ({"stpes": 3}, "unknown setting stpes; did you mean value.steps?"),
    ({"steps": 3}, "unknown setting steps; did you mean value.steps?"),
    ({"value": {"stpes": 3}}, "unknown setting value.stpes; did you mean value.steps?"),
    ({1: 2}, "unknown setting 1; there are layers, value, templates, moments, rewind_values, covariance_weight,"),
    ({"moments": {"quux": 1}}, "unknown setting moments.quux; there are moments.tokens, moments.window,"),
]


@pytest.mark.parametrize(("changes", "sentence"), PROBLEMS, ids=lambda value: str(value)[:30])
def test_a_problem_is_one_sentence_in_our_words(changes, sentence):
    config = load_preset("nse", "smollm2-135m")
    for judge in (lambda: changed(config, changes), lambda: check_changes(NSEConfig, changes)):
        with pytest.raises(ValueError, match=r"^") as wrong:
            judge()
        assert str(wrong.value).startswith(sentence)
        assert len(str(wrong.value).splitlines()) == 1


def test_all_problems_are_told_at_once():
    with pytest.raises(WrongSettings) as wrong:
        NSEConfig(rouds=1, mass=7, value={"steps": 1, "lr": 0})
    assert str(wrong.value).splitlines() == [
        "layers is missing, and has no default",
        "value.steps must be a whole number, at least 2, got 1",
        "value.lr must be a number, above 0, got 0",
        "covariance_weight is missing, and has no default",
        "mass must be a number, above 0 and at most 1, got 7",
        "unknown setting rouds; did you mean rounds?",
    ]


@pytest.mark.parametrize(
    ("make", "sentence"),
    [
        (lambda: KNEConfig(fixed=True, ensemble="own"), "ensemble 'own' is located edit by edit and cannot be fixed"),
        (lambda: KNEConfig(key_layers="x"), "key_layers must be a whole number or a list of layers (4-8 or 4,6,8) or"),
        (lambda: changed(CONFIGS["meg"], {"fit": {"template": "x"}}), "fit.template must hold {} once and not end in"),
        (lambda: MegConfig(gate={"knd": "cosine"}), "unknown setting gate.knd; did you mean gate.kind?"),
        (
            lambda: setattr(load_preset("nse", "smollm2-135m"), "rounds", 3),
            "rounds: settings are frozen; ",
        ),
    ],
    ids=["of two settings", "either type", "of a part", "unknown in a part", "frozen"],
)
def test_no_word_of_a_library_leaks(make, sentence):
    with pytest.raises(ValueError, match=r"^") as wrong:
        make()
    assert str(wrong.value).startswith(sentence)
    assert "pydantic" not in str(wrong.value)
    assert "validation error" not in str(wrong.value)


def test_what_may_stand_in_the_preset_is_judged_later():
    check_changes(NSEConfig, {"rounds": 3})
    check_changes(KNEConfig, {"fixed": True, "ensemble": "own"})


@pytest.mark.parametrize(
    ("given", "layers"),
    [("4-8", [4, 5, 6, 7, 8]), ("4,6,8", [4, 6, 8]), (" 2, 4 - 6 ", [2, 4, 5, 6]), (4, [4]), ([1, 2], [1, 2])],
)
def test_layers_are_written_in_short(given, layers):
    assert layer_list(given) == layers
    assert NSEConfig(layers=given, covariance_weight=1).layers == tuple(layers)
    assert list(changed(load_preset("nse", "smollm2-135m"), {"layers": given}).layers) == layers


@pytest.mark.parametrize("layers", [[], [4], [4, 5, 6, 7, 8], [4, 6, 8], [2, 4, 5, 6]])
def test_layers_are_told_in_short(layers):
    assert not layers or layer_list(layers_in_short(layers)) == layers
    assert len(layers_in_short(range(1000))) == len("0-999")


def bounds_that_infinity_lifts(kind, before=""):
    """Dotted names of the numbers of a class of settings that may be infinite, tried one by one."""
    for name, field in kind.model_fields.items():
        if isinstance(field.default, Config):
            yield from bounds_that_infinity_lifts(type(field.default), f"{before}{name}.")
        elif "float" in str(field.annotation):
            try:
                check_changes(kind, {name: float("inf")})
                yield f"{before}{name}"
            except ValueError:
                pass


def test_a_number_is_finite_unless_it_is_a_bound():
    kinds = [*(method.config_class for method in METHODS.values()), MegConfig]
    assert {name for kind in kinds for name in bounds_that_infinity_lifts(kind)} == {
        "value.clamp",
        "residual_max",
        "gate.threshold",
    }
    assert changed(load_preset("nse", "smollm2-135m"), parse_changes(["residual_max=.inf"])).residual_max == float(
        "inf"
    )


def test_a_number_of_layers_stays_a_number():
    assert KNEConfig(key_layers=4).key_layers == 4
    assert KNEConfig(key_layers="4-5").key_layers == (4, 5)


def test_settings_are_plain_yaml():
    for text, message in (
        ("rounds=!!python/object:os.system 2", "rounds='!!python/object:os.system 2' holds a tag"),
        ("rounds=&a 2", "rounds='&a 2' holds an anchor or alias"),
        ("fit.template={} says", "fit.template='{} says' is not YAML"),
    ):
        with pytest.raises(ValueError, match=r"^") as wrong:
            parse_changes([text])
        assert str(wrong.value).startswith(message)
        assert "\n" not in str(wrong.value)


def test_a_setting_is_set_once():
    assert parse_changes(["rounds=2", "rounds=2"]) == {"rounds": 2}
    with pytest.raises(ValueError, match=r"^") as wrong:
        parse_changes(["rounds=2", "rounds=3", "lr"])
    assert str(wrong.value).splitlines() == [
        "'rounds' is set twice, the second time by 'rounds=3'",
        "a setting must look like rounds=2 or value.steps=10, got 'lr'",
    ]
