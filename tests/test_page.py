"""The page as a text: each detail is named where it acts, definitions are short, the algorithm is free of chores."""

import ast
import builtins
import re
from statistics import mean

import pytest
from conftest import ROOT

SOURCE = (ROOT / "ppo.py").read_text()
LINES = SOURCE.splitlines()
TREE = ast.parse(SOURCE)

# Where each of "The 37 Implementation Details of PPO" acts.
DETAILS = {
    "core 1": "collect",  # vectorised environments
    "core 2": "layer_init",  # orthogonal weights
    "core 3": "Adam.step",  # Adam's epsilon
    "core 4": "train",  # a falling learning rate
    "core 5": "compute_gae",
    "core 6": "minibatches",
    "core 7": "minibatches",  # standardised advantages
    "core 8": "policy_loss",  # the clipped surrogate objective
    "core 9": "value_loss",  # clipped
    "core 10": "compute_gradient",  # the whole objective, with the entropy bonus
    "core 11": "clip_norm",
    "core 12": "policy_change",  # what is logged to find faults
    "core 13": "Agent",  # separate networks, or one with two heads
    "Atari 1": "make_envs",  # idle steps at the start
    "Atari 2": "make_envs",  # frames skipped, the maximum of the last two
    "Atari 3": "Worlds.step",  # a lost life ends the value horizon
    "Atari 4": "make_envs",  # fire at the start
    "Atari 5": "make_envs",  # small grey images
    "Atari 6": "estimate",  # the sign of the reward
    "Atari 7": "make_envs",  # stacked frames
    "Atari 8": "Agent",  # the CNN
    "Atari 9": "CNN",  # pixels from 0 to 1
    "continuous 1": "Gaussian",
    "continuous 2": "Gaussian",  # one deviation, whatever the observation
    "continuous 3": "Gaussian.logprob_and_entropy",  # independent dimensions
    "continuous 4": "Agent",  # separate networks
    "continuous 5": "to_env",  # actions clipped for the environment only
    "continuous 6": "Agent.encode",  # standardised observations
    "continuous 7": "Agent.encode",  # clipped
    "continuous 8": "estimate",  # scaled rewards
    "continuous 9": "estimate",  # clipped
    "LSTM 1": "Memory.__init__",  # orthogonal weights, zero biases
    "LSTM 2": "Memory.forward",  # states of zero at the start
    "LSTM 3": "Worlds.step",  # states reset at an episode's end
    "LSTM 4": "minibatches",  # sequences in minibatches
    "LSTM 5": "Memory.forward",  # states made again in the update
    "MultiDiscrete 1": "Categorical.logprob_and_entropy",  # independent components
}
POST = {"core": 13, "Atari": 9, "continuous": 9, "LSTM": 5, "MultiDiscrete": 1}  # how many each of its parts has
SECTIONS = [
    "Settings",
    "The agent",
    "The mathematics of PPO",
    "Collect, estimate, optimise",
    "Memory",
    "Spaces",
    "Running statistics",
    "Worlds",
    "Devices and ranks",
    "Play",
    "The run's folder",
    "Sharing",
    "Checks and presets",
    "The program",
]
# What the algorithm may use of all that is imported; the built-in functions it may not use; and, of any object, the
# attributes it may not: files, and what torch has besides tensors and layers
ALLOWED = """
Any Callable Iterator Path Tensor dataclass field math nn np replace time torch""".split()
FORBIDDEN = "__import__ breakpoint compile eval exec exit globals input open print quit".split()
CHORES = """
_dynamo backends compile compiler cuda distributed exists from_pretrained fromfile glob hub is_dir is_file iterdir jit
load memmap mkdir open push_to_hub read_bytes read_text rename rglob rmdir save save_pretrained savez set_num_threads
tofile touch unlink write_bytes write_text""".split()


def definitions(node=TREE, prefix=""):
    """(qualified name, node) of all classes and functions, those inside others too."""
    for child in ast.iter_child_nodes(node):
        if isinstance(child, (ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)):
            yield prefix + child.name, child
            yield from definitions(child, f"{prefix}{child.name}.")
        else:
            yield from definitions(child, prefix)


NODES = dict(definitions())


def span(name):
    """First and last line of a definition, its decorators included, counted from 1."""
    node = NODES[name]
    return min([node.lineno, *(d.lineno for d in node.decorator_list)]), node.end_lineno


def marks(text):
    """Every [core 3], [Atari 1, 2, 5] or [core 13, continuous 4] in it, one by one: ["core 3", "Atari 1", ...]."""
    found = []
    for group in re.findall(r"\[([A-Za-z]+ \d+(?:, (?:[A-Za-z]+ )?\d+)*)\]", text):
        kind = ""
        for word in group.split(", "):
            kind, number = word.split() if " " in word else (kind, word)
            found.append(f"{kind} {number}")
    return found


def algorithm():
    """First and last line of the page's heart: from the Agent to the end of `train`."""
    return span("Agent")[0], span("train")[1]


def test_marks_are_read_one_by_one():
    assert marks("[core 3] x[T, N] [Atari 1, 2, 5] [n, 3] [core 13, continuous 4] [core] [a 1b]") == [
        "core 3", "Atari 1", "Atari 2", "Atari 5", "core 13", "continuous 4",
    ]  # fmt: skip


def test_the_table_has_all_details():
    every = {f"{part} {n}" for part, count in POST.items() for n in range(1, count + 1)}
    assert len(every) == 37
    assert every == set(DETAILS)


@pytest.mark.parametrize("detail", DETAILS)
def test_a_detail_is_named_where_it_acts(detail):
    first, last = span(DETAILS[detail])
    where = [i for i, line in enumerate(LINES, 1) if detail in marks(line)]
    assert any(first <= i <= last for i in where), f"[{detail}] is in lines {where}, not in {first} to {last}"


def test_no_detail_is_named_that_the_post_does_not_have_or_the_page_does_not_implement():
    assert set(marks(SOURCE)) <= set(DETAILS)


def test_no_detail_is_named_where_it_does_not_act():
    """Below the opening docstring each is named inside its own definition, and nowhere else."""
    docstring = TREE.body[0].end_lineno
    for i, line in enumerate(LINES[docstring:], docstring + 1):
        for detail in marks(line):
            first, last = span(DETAILS[detail])
            assert first <= i <= last, f"line {i} names [{detail}], which acts in {DETAILS[detail]}"


def test_sections_stand_in_the_order_of_an_essay():
    banners = [line.removeprefix("# ---- ").rstrip("- ") for line in LINES if line.startswith("# ----")]
    assert len(banners) == len(SECTIONS)
    for banner, section in zip(banners, SECTIONS):
        assert re.split(r"[:,] ", banner)[0] == re.split(r"[:,] ", section)[0]
        assert banner.startswith(section)


def test_the_page_is_light():
    """Whoever adds takes something away; none of these figures is ever raised."""
    assert len(SOURCE) <= 88_000
    assert len(LINES) <= 1750
    assert sum(isinstance(node, (ast.ClassDef, ast.FunctionDef)) for node in TREE.body) <= 92


def test_the_algorithm_is_early_on_the_page_and_short():
    first, last = algorithm()
    assert last - first + 1 <= 380
    assert last <= 620
    lines = [line.strip() for line in LINES[first - 1 : last]]
    assert mean(len(line) for line in lines if line and not line.startswith("#")) <= 50


def test_definitions_are_short():
    lengths = {name: last - first + 1 for name in NODES for first, last in [span(name)]}
    assert {name: n for name, n in lengths.items() if n > 60 and name not in ("Agent", "Args")} == {}


def test_the_algorithm_does_no_chores():
    """From the Agent to the end of `train`: no files, Hub, signals, compiler; only the page, torch and NumPy."""
    first, last = algorithm()
    imports = [node for node in ast.walk(TREE) if isinstance(node, (ast.Import, ast.ImportFrom))]
    imported = {alias.asname or alias.name.partition(".")[0] for node in imports for alias in node.names}
    assert {"hub", "signal", "os", "io", "json"} <= imported and {"open", "compile"} <= set(dir(builtins))
    nodes = [node for node in ast.walk(TREE) if first <= getattr(node, "lineno", 0) <= last]
    base = next(b for b in NODES["Agent"].bases if ast.unparse(b) == "hub.PyTorchModelHubMixin").value
    for node in nodes:
        assert not isinstance(node, (ast.Import, ast.ImportFrom)), f"line {node.lineno} imports"
        if isinstance(node, ast.Name) and node is not base:  # the Agent may be one that the Hub can load
            used = node.id
            assert used not in (imported - set(ALLOWED)) | set(FORBIDDEN), f"line {node.lineno} uses {used}"
        if isinstance(node, ast.Attribute) and ast.unparse(node) != "args.compile":
            assert node.attr not in CHORES, f"line {node.lineno} uses {ast.unparse(node)}"
