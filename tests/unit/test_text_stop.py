"""The stop matcher against a naive one, however the text is cut."""

from hypothesis import given, settings
from hypothesis import strategies as st

from trimaran.core.text.stop import StopMatcher, StopStrings

LETTERS = st.text(alphabet="ab<|é", max_size=40)
STOPS = st.lists(st.text(alphabet="ab<|é", min_size=1, max_size=5), min_size=1, max_size=5)


def naive(text: str, stops: list[str], include: bool, armed_after: int) -> tuple[str, str | None]:
    """The first end wins; of those that end together, the longest."""
    for end in range(armed_after + 1, len(text) + 1):
        found = [stop for stop in stops if text[:end].endswith(stop)]
        if found:
            longest = max(found, key=len)
            return text[: end if include else end - len(longest)], longest
    return text, None


def cut(text: str, sizes: list[int]) -> list[str]:
    chunks = []
    while text:
        size = sizes[len(chunks) % len(sizes)]
        chunks.append(text[:size])
        text = text[size:]
    return chunks


@settings(deadline=None, max_examples=300)
@given(
    LETTERS,
    STOPS,
    st.lists(st.integers(1, 5), min_size=1, max_size=4),
    st.booleans(),
    st.integers(0, 4),
)
def test_equals_the_naive_search_for_every_cut(text, stops, sizes, include, unarmed_chunks):
    matcher = StopMatcher(StopStrings(stops), include)
    chunks = cut(text, sizes)
    shown = ""
    for number, chunk in enumerate(chunks):
        shown += matcher.feed(chunk, armed=number >= unarmed_chunks)
        if matcher.matched is not None:
            break
    else:
        shown += matcher.flush()
    armed_after = len("".join(chunks[:unarmed_chunks]))
    assert (shown, matcher.matched) == naive(text, stops, include, armed_after)


@settings(deadline=None, max_examples=200)
@given(LETTERS, STOPS)
def test_what_may_become_a_stop_string_is_not_shown_and_everything_else_is(text, stops):
    matcher = StopMatcher(StopStrings(stops))
    shown = 0
    for end, char in enumerate(text, start=1):
        shown += len(matcher.feed(char))
        if matcher.matched is not None:
            break
        begun = (
            size
            for stop in stops
            for size in range(1, len(stop))
            if text[:end].endswith(stop[:size])
        )
        assert shown == end - max(begun, default=0)


def test_a_stop_string_over_many_chunks_is_cut_and_the_rest_dropped():
    matcher = StopMatcher(StopStrings(["\n\nUser:"]))
    shown = [matcher.feed(chunk) for chunk in ["Hi", "!\n", "\nUs", "er", ": what"]]
    assert shown == ["Hi", "!", "", "", ""]
    assert matcher.matched == "\n\nUser:"


def test_what_only_looked_like_a_stop_string_is_released():
    matcher = StopMatcher(StopStrings(["</s>"]))
    assert [matcher.feed(chunk) for chunk in ["a<", "/s", "o"]] == ["a", "", "</so"]
    assert matcher.feed("<") == ""
    assert matcher.flush() == "<"


def test_included_stop_strings_need_no_holding_back():
    matcher = StopMatcher(StopStrings(["END"]), include=True)
    assert [matcher.feed(chunk) for chunk in ["xE", "N", "D tail"]] == ["xE", "N", "D"]


def test_many_long_stop_strings_cost_no_more_than_one():
    strings = StopStrings([chr(97 + i % 26) * 1000 + str(i) for i in range(64)])
    matcher = StopMatcher(strings)
    text = "a" * 20_000
    assert len(matcher.feed(text) + matcher.flush()) == len(text)
