"""tulu_mixture/sources.py: every conversion rule, on hand-made records of the raw schemas."""

import itertools

import pytest

import mixture
from program.errors import InputError
from tulu_mixture.sources import SCIENCE_TASKS, SOURCES, WITH_INPUT, WITHOUT_INPUT

SOURCE = {source.name: source for source in SOURCES}


class Draws:
    """A random stream that returns given numbers."""

    def __init__(self, *numbers):
        self.random = iter(numbers).__next__


def convert(name, record, *draws):
    """The conversations and the reasons that a converter yields."""
    results = list(SOURCE[name].convert(record, Draws(*draws)))
    return [r for r in results if isinstance(r, dict)], [r for r in results if isinstance(r, str)]


def user(text):
    return {"role": "user", "content": text}


def assistant(text):
    return {"role": "assistant", "content": text}


@pytest.mark.parametrize("name", ["flan_v2", "cot"])
@pytest.mark.parametrize(
    ("inputs", "prompt"),
    [
        ("Translate: cat", "Translate: cat\n"),
        ("Translate: cat\n", "Translate: cat\n"),
        ("Translate:", "Translate:"),
        ("Translate: \t ", "Translate: \t "),  # right-stripped it ends in a colon
        ("Answer:\n\n", "Answer:\n\n"),
        ("a b ", "a b \n"),
        ("", "\n"),
    ],
)
def test_flan_prompt_ends_in_newline_or_colon(name, inputs, prompt):
    """A newline is added unless there is one, or the last visible character is a colon."""
    made, reasons = convert(name, {"inputs": inputs, "targets": " chat ", "task": "x"})
    assert made == [{"messages": [user(prompt), assistant(" chat ")]}]
    assert reasons == []


def node(text, role, *replies, quality=None, deleted=False):
    """A message of an Open Assistant tree."""
    labels = {"spam": {"value": 0.0, "count": 3}}
    if quality is not None:
        labels["quality"] = {"value": quality, "count": 3}
    replies = list(replies)
    return {"text": text, "role": role, "deleted": deleted, "labels": labels, "replies": replies}


def prompter(text, *replies, **more):
    return node(text, "prompter", *replies, **more)


def reply(text, *replies, **more):
    return node(text, "assistant", *replies, **more)


UNANSWERED = ["trees whose best path ends in a prompt without an answer"]
ALL_DELETED = ["trees whose best path ends in an answer with only deleted replies"]


@pytest.mark.parametrize(
    ("prompt", "path", "reasons"),
    [
        # The best reply of every message, prompts included.
        (
            prompter(
                "q",
                reply("bad", quality=0.25),
                reply(
                    "good",
                    prompter("q2 poor", reply("a2 poor"), quality=0.1),
                    prompter("q2", reply("a2", quality=0.0), quality=0.5),
                    quality=0.75,
                ),
            ),
            ["q", "good", "q2", "a2"],
            [],
        ),
        # The first of equals; a missing mark counts 0.0, more than a negative one.
        (prompter("q", reply("a", quality=0.5), reply("b", quality=0.5)), ["q", "a"], []),
        (prompter("q", reply("a", quality=0), reply("b")), ["q", "a"], []),
        (prompter("q", reply("a"), reply("b", quality=0.0)), ["q", "a"], []),
        (prompter("q", reply("a", quality=-0.5), reply("b")), ["q", "b"], []),
        # Deleted messages, however good, and all replies below them do not count.
        (
            prompter("q", reply("gone", quality=1.0, deleted=True), reply("a", quality=0.1)),
            ["q", "a"],
            [],
        ),
        (prompter("q", reply("a"), deleted=True), None, ["trees whose first prompt is deleted"]),
        # The best path does not end in an answer, and no other path is tried.
        (prompter("q"), None, UNANSWERED),
        (prompter("q", reply("a", deleted=True)), None, UNANSWERED),
        (
            prompter("q", reply("a", prompter("q2"), quality=1.0), reply("b", quality=0.5)),
            None,
            UNANSWERED,
        ),
        (prompter("q", reply("a", prompter("q2", deleted=True))), None, ALL_DELETED),
    ],
)
def test_oasst1_follows_the_best_path(prompt, path, reasons):
    """A tree gives at most one conversation: best reply, first of equals, none that is deleted."""
    made, left_out = convert("oasst1", {"message_tree_id": "t", "prompt": prompt})
    expected = [f(text) for f, text in zip(itertools.cycle((user, assistant)), path or [])]
    assert made == ([{"messages": expected}] if path else [])
    assert left_out == reasons


def test_oasst1_without_any_labels():
    """A message without the field `labels` counts as one without a quality mark."""
    tree = prompter("q", reply("a"))
    del tree["replies"][0]["labels"], tree["labels"]
    assert convert("oasst1", {"prompt": tree})[0] == [{"messages": [user("q"), assistant("a")]}]


def test_lima_cuts_an_odd_last_message():
    """Texts are by user and assistant in turn; a last one without an answer is cut and counted."""
    even = {"conversations": ["q", "a", "q2", "a2"], "source": "multi_turn"}
    odd = {"conversations": ["q", "a", "q2"], "source": "multi_turn"}
    messages = [user("q"), assistant("a"), user("q2"), assistant("a2")]
    assert convert("lima", even) == ([{"messages": messages}], [])
    cut = ["last messages without an answer, cut off"]
    assert convert("lima", odd) == ([{"messages": messages[:2]}], cut)


def test_template_weights():
    """14 templates each; their weights are twentieths and sum to 1; the plainest has a fifth."""
    for templates in (WITH_INPUT, WITHOUT_INPUT):
        weights = [weight for weight, _, _ in templates]
        assert sum(weights) == 20
        assert sorted(weights) == [1] * 10 + [2] * 3 + [4]
        assert sum("### Instruction:\n{I}\n\n###" in prompt for _, prompt, _ in templates) == 1
        for _, prompt, _ in templates:
            assert prompt.count("{I}") == 1
            assert prompt.count("{X}") == (templates is WITH_INPUT)
            assert not mixture.has_keyword({"messages": [user(prompt)]})
    assert [lead for _, _, lead in WITHOUT_INPUT if lead] == ["\n"]
    assert not any(lead for _, _, lead in WITH_INPUT)


@pytest.mark.parametrize("name", ["gpt4_alpaca", "code_alpaca"])
@pytest.mark.parametrize(
    ("draw", "given", "prompt", "answer"),
    [
        (0.0, " X ", "I\n\nX\n\n", "O"),
        (0.199, " X ", "I\n\nX\n\n", "O"),  # slots 0 to 3 of 20
        (0.2, " X ", "I\nX\n\n", "O"),
        (0.3, "X", "I\nX\n", "O"),
        (0.999, "X", "Instruction:I\n\nInput: X\n\n", "O"),
        (0.0, "", "I\n\n", "O"),
        (0.2, None, "I\n", "O"),
        (0.3, " \n\t", "I", "\nO"),  # white space is no input; here the answer has the newline
        (0.5, "", "I Output:", "O"),
    ],
)
def test_alpaca_templates(name, draw, given, prompt, answer):
    """One draw chooses the template; all three texts are stripped."""
    made, _ = convert(name, {"instruction": " I\n", "input": given, "output": "\nO "}, draw)
    assert made == [{"messages": [user(prompt), assistant(answer)]}]


def test_alpaca_text_is_no_template():
    """Braces in a text stay as they are."""
    record = {"instruction": "{X} {I} {", "input": "{0}", "output": "}{"}
    made, _ = convert("code_alpaca", record, 0.0)
    assert made == [{"messages": [user("{X} {I} {\n\n{0}\n\n"), assistant("}{")]}]


def shared(*pairs, senders="hg", odd=0):
    """A ShareGPT record with pairs of these lengths, which include BOS and 6 for each message."""
    tokens = list(itertools.chain(*((10 - 7, pair - 10 - 7) for pair in pairs)))
    names = {"h": "human", "g": "gpt", "s": "system", "b": "bing", "u": "user"}
    cycle = itertools.cycle(senders) if len(senders) == 2 else iter(senders)
    turns = [{"from": names[next(cycle)], "value": f"m{i}"} for i in range(len(tokens) + odd)]
    return {"id": "abc", "conversations": turns, "tokens": tokens + [5] * odd}


def chunk(first, end):
    texts = [(assistant if i % 2 else user)(f"m{i}") for i in range(first, end)]
    return {"id": f"sharegpt_abc_{first}", "messages": texts}


LONG, LOST = "pairs of more than 4096 tokens, skipped", "last pairs that did not fit, lost"
SHORT = "conversations of fewer than two messages"
ODD = "last messages without a counterpart, cut off"


@pytest.mark.parametrize(
    ("record", "chunks", "reasons"),
    [
        (shared(4096), [(0, 2)], []),
        (shared(4097), [], [LONG]),
        (shared(2048, 2048), [(0, 4)], []),
        (shared(2048, 2049), [(0, 2)], [LOST]),
        # A pair that overflows begins a chunk, which only a later pair closes.
        (shared(2048, 2049, 100), [(0, 2), (2, 6)], []),
        (shared(3000, 3000, 3000), [(0, 2), (2, 4)], [LOST]),
        # A pair that is too long closes the chunk before it and is skipped …
        (shared(100, 5000, 100, 100), [(0, 2), (4, 8)], [LONG]),
        # … and the pair after it overflows, too; if it is the last, it is lost.
        (shared(100, 5000, 100), [(0, 2)], [LONG, LOST]),
        (shared(5000, 100), [], [LONG, LOST]),
        (shared(5000, 100, 100), [(2, 6)], [LONG]),
        (shared(100, 5000, 5000), [(0, 2)], [LONG, LONG]),
        # An odd message is cut before the split; less than a pair gives no conversation.
        (shared(100, odd=1), [(0, 2)], [ODD]),
        (shared(100, 4000, odd=1), [(0, 2)], [ODD, LOST]),
        (shared(odd=1), [], [SHORT]),
        (shared(), [], [SHORT]),
        # Senders are judged chunk by chunk.
        (shared(100, 100, senders="hgsg"), [], ["chunks with a message from 'system' or 'bing'"]),
        (
            shared(4000, 4000, 50, senders="hghbhg"),
            [(0, 2)],
            ["chunks with a message from 'system' or 'bing'"],
        ),
        (shared(100, senders="gh"), [], ["chunks in which 'human' and 'gpt' do not alternate"]),
        (shared(100, senders="hh"), [], ["chunks in which 'human' and 'gpt' do not alternate"]),
        (shared(100, senders="ug"), [], ["chunks in which 'human' and 'gpt' do not alternate"]),
    ],
)
def test_sharegpt_split(record, chunks, reasons):
    """Chunks are greedy, of whole pairs, at most 4,096 tokens; the original's losses; the ids."""
    made, left_out = convert("sharegpt", record)
    assert made == [chunk(*ends) for ends in chunks]
    assert sorted(left_out) == sorted(reasons)


def test_wizardlm_open_orca_science_hard_coded():
    """The four plain schemas; Open-Orca has a system message even if it is empty."""
    turns = [{"from": "human", "value": " q"}, {"from": "gpt", "value": "a "}]
    made = {"id": "wizardlm_7Kx", "messages": [user(" q"), assistant("a ")]}
    assert convert("wizardlm", {"idx": "7Kx", "conversations": turns}) == ([made], [])
    row = {"id": "niv.1", "system_prompt": "", "question": "q", "response": "a"}
    system = {"role": "system", "content": ""}
    made = {"id": "open_orca_niv.1", "messages": [system, user("q"), assistant("a")]}
    assert convert("open_orca", row) == ([made], [])
    system["content"] = "Be brief."
    assert convert("open_orca", {**row, "system_prompt": "Be brief."}) == ([made], [])
    row = {"input": "q", "output": "a", "dataset": "scierc_ner"}
    made = {"dataset": "science.scierc_ner", "messages": [user("q"), assistant("a")]}
    assert convert("science", row) == ([made], [])
    made = {"messages": [user("Who are you?"), assistant("Tulu.")]}
    assert convert("hard_coded", {"Prompt": "Who are you?", "Output": "Tulu."}) == ([made], [])


@pytest.mark.parametrize(
    ("name", "record", "message"),
    [
        ("flan_v2", {"inputs": "q"}, "no field 'targets' (there are: inputs)"),
        ("flan_v2", {"inputs": 3, "targets": "a"}, "field 'inputs' is int, expected str"),
        ("cot", {"inputs": "\ud800", "targets": "a"}, "half a surrogate pair"),
        ("oasst1", {"prompt": []}, "field 'prompt' is list, expected dict"),
        ("oasst1", {"prompt": node("q", "critic")}, "role 'critic'"),
        ("oasst1", {"prompt": prompter("q", "a")}, "is str, expected dict"),
        ("oasst1", {"prompt": {**prompter("q"), "replies": None}}, "'replies' is NoneType"),
        ("oasst1", {"prompt": {**prompter("q"), "deleted": 0}}, "'deleted' is int"),
        ("oasst1", {"prompt": prompter("q", quality="high")}, "'value' is str"),
        ("lima", {"conversations": ["q"]}, "1 message, expected"),
        ("lima", {"conversations": ["q", None]}, "a message is NoneType"),
        ("gpt4_alpaca", {"instruction": "i", "output": "o"}, "no field 'input'"),
        ("gpt4_alpaca", {"instruction": "i", "input": [], "output": "o"}, "str or NoneType"),
        ("wizardlm", {"idx": "1", "conversations": []}, "messages from []"),
        (
            "wizardlm",
            {"idx": "1", "conversations": [{"from": "human", "value": "q"}]},
            "messages from ['human']",
        ),
        ("open_orca", {"id": "1", "system_prompt": None, "question": "q"}, "'system_prompt' is"),
        ("science", {"input": "q", "output": "a", "dataset": None}, "'dataset' is NoneType"),
        ("hard_coded", {"Prompt": " ", "Output": "a"}, "is empty"),
        ("hard_coded", {"prompt": "q", "output": "a"}, "no field 'Prompt'"),
    ],
)
def test_what_breaks_the_schema_is_an_error(name, record, message):
    """The error names the field, what it holds, and what was expected."""
    with pytest.raises(InputError) as error:
        convert(name, record, 0.0)
    assert message in str(error.value)


def test_published_counts_add_up():
    """330,490 conversations before the filter, 326,154 after it; science sums up its tasks."""
    assert sum(source.before for source in SOURCES) == 330_490
    assert sum(source.after for source in SOURCES) == 326_154
    assert sum(SCIENCE_TASKS.values()) == SOURCE["science"].after
