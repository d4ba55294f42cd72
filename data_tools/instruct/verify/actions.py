"""Actions: supported, contradicted where captions give the same subject another one, or unknown."""

from collections.abc import Iterator
from dataclasses import replace
from functools import cache

from data_tools import wording
from data_tools.instruct.schema import Check
from data_tools.instruct.verify.case import Case
from data_tools.instruct.verify.describing import (
    ANIMALS,
    PRONOUN,
    Action,
    action_stems,
    actions,
    noun_name,
)
from data_tools.instruct.verify.flags import ACTION
from data_tools.instruct.verify.grammar import (
    BE,
    INTRODUCING,
    determiner,
    last_of_phrase,
    singular,
    word_set,
)
from data_tools.instruct.verify.lexicon import Mention
from data_tools.instruct.verify.numbers import quantity
from data_tools.instruct.verify.reading import Sentence


def check(case: Case) -> Iterator[Check]:
    """Yield a finding for each kind of verb of the answer."""
    reading, knowledge = case.answer_reading, case.knowledge
    if not reading.bits & ACTION:
        return
    judged: set[str] = set()
    named: set[str] = set()
    for number, sentence in enumerate(reading.sentences):
        for action in actions(sentence):
            resolved = False
            if action.subject == PRONOUN and (number or action.index > 4):
                # `They` of a description are whom it named first
                people = _first_mention(case)
                if people is not None:
                    name = people.entry.categories[0]
                    action = replace(action, subject=name, mention=people)
                    resolved = True
            first = resolved or action.mention is None or _is_first(case, sentence, named, action)
            if action.stem in judged:
                continue
            judged.add(action.stem)
            captions = knowledge.actions.get(action.stem, ())
            span, claim = sentence.span(action.index, action.index), action.stem
            wrong: tuple[int, ...] = ()
            if sentence.asserts(action.index, action.index):
                wrong = _swapped(case, action) if captions else ()
                if wrong:
                    claim = f"{action.mention.word if action.mention else ''} {claim}"
                elif captions:
                    if action.stem in _POSTURES and _is_of_another(case, action):
                        wrong = excluding(case, action, sentence, opening=number == 0, first=first)
                else:
                    wrong = excluding(case, action, sentence, opening=number == 0, first=first)
                    if not wrong and first:
                        wrong = _unseen(case, action, sentence, opening=number == 0)
            if wrong:
                yield case.check(
                    "action", "contradicted", "ACTION_WRONG", "answer", span, claim, wrong
                )
            elif captions:
                ids = tuple(n for n in captions if n)
                yield case.check("action", "supported", None, "answer", span, claim, ids)
            else:
                refused = case.config.unknown_attributes == "reject"
                code = "ATTRIBUTE_UNKNOWN" if refused and case.sample_type != "reasoning" else None
                yield case.check("action", "unknown", code, "answer", span, claim)
        named.update(name for m in sentence.mentions for name in m.entry.categories)


def check_unlisted(case: Case) -> Iterator[Check]:
    """Judge `He is signing autographs.`, where captions have no word of it but of other actions.

    Of the one that is asked about (`What is he doing?`), or the only one of its kind in the image.
    Verbs that are listed are judged by what captions have in their place.
    """
    known = case.knowledge
    asks = case.question_reading.words[:1] == ["what"] and _asks_for_action(case)
    if not known.solo and not (asks and case.asked):
        return
    for number, sentence in enumerate(case.answer_reading.sentences):
        words = sentence.words
        for verb in range(1, len(words)):
            if not words[verb].endswith("ing") or words[verb - 1] not in BE:
                continue
            last = _object_of(sentence, verb)
            if words[verb] in action_stems() or words[verb] in _VAGUE or last is None:
                continue
            if number == 0 and verb < 8 and asks and case.asked:
                names = case.asked[0].entry.categories
                subject = "person" if "person" in names else names[0]
                ids = {n for ids in known.actions_of.get(subject, {}).values() for n in ids}
            else:
                ids = _of_only_one(case, sentence, verb)
            stem = words[verb][:-3].rstrip("e")
            stem = stem[:-1] if stem[-1:] == stem[-2:-1] else stem
            claimed = Action(words[verb], None, None, verb, None)
            if (
                len(ids) > 2
                and not any(word.startswith(stem) for word in known.words)
                and _has_unknown_object(case, claimed, sentence)
                and sentence.asserts(verb, last)
            ):
                span, claim = sentence.span(verb, last), f"{words[verb]} {words[last]}"
                yield case.check(
                    "action", "contradicted", "ACTION_WRONG", "answer", span, claim,
                    tuple(sorted(ids)),
                )  # fmt: skip
                return


def _of_only_one(case: Case, sentence: Sentence, verb: int) -> set[int]:
    """Return the captions with what the subject of a verb does, the only one of its kind."""
    begin, _ = sentence.clause(verb)
    before = [m for m in sentence.mentions if begin <= m.first and m.last < verb]
    if not before and sentence.words[begin] in ("he", "she", "it"):
        first = _first_mention(case)
        before = [first] if first is not None else []
    if len(before) != 1 or before[0].number != "one":
        return set()
    names = before[0].entry.categories
    return case.knowledge.solo.get("person" if "person" in names else names[0], set())


def _object_of(sentence: Sentence, verb: int) -> int | None:
    """Return the last word of the phrase that follows a verb; None where none does."""
    words, start = sentence.words, verb + 1
    while start < len(words) and words[start] in INTRODUCING:
        start += 1
    last = last_of_phrase(words, start, len(words))
    return last if last >= start else None


def check_yes_no(case: Case) -> Iterator[Check]:
    """Judge `Is the cat sleeping?` `Yes.`"""
    question, sentence = case.question, case.question.sentence
    if question.kind != "yes_no" or question.polarity != "yes" or sentence is None:
        return
    for action in actions(sentence):
        if action.mention is None or case.knowledge.actions.get(action.stem):
            continue
        ids = excluding(case, action, sentence, opening=True, first=True)
        if ids:
            span = sentence.span(action.index, action.index)
            yield case.check(
                "action", "contradicted", "ACTION_WRONG", "question", span, action.stem, ids
            )


def excluding(
    case: Case, action: Action, sentence: Sentence, *, opening: bool, first: bool
) -> tuple[int, ...]:
    """Return the captions whose action excludes this one; none where they do not decide.

    Args:
        case: The turn.
        action: What the answer claims; no caption has it.
        sentence: Where it does.
        opening: Whether its sentence is the answer's first.
        first: Whether its subject is the first of its category that the answer names.
    """
    subject, number = _subject(case, action, opening=opening)
    if action.stem in ("ride", "drive") and action.target is not None:
        ridden = _ridden(case, action.target)
        if ridden:
            return ridden
    if subject is None or (subject not in _ANIMATE and action.stem not in _OF_VEHICLES):
        return ()
    known = case.knowledge.actions_of.get(subject, {})
    if not known:
        return ()
    asked = opening and _asks_for_action(case)
    if asked and number == "many" and subject in case.knowledge.single:
        return ()  # captions do not speak of these
    general = case.sample_type == "reasoning" and _is_general(action, sentence)
    herd = number == "many" and first and subject in ANIMALS and not general
    alone = first and _is_alone(case, subject, number)
    if not asked and not herd and not alone:
        known = _of_same_word(case, action, sentence) if first else {}
    excluded = _excluded(subject == "person")
    tasks, compatible = _tasks()
    ids: set[int] = set()
    busy: set[int] = set()
    for stem, captions in known.items():
        if stem in excluded.get(action.stem, ()):
            ids.update(captions)
        elif action.stem in tasks and stem in tasks:
            if (action.stem, stem) in compatible:
                return ()
            busy.update(captions)
    if asked or (alone and len(busy) > 1):
        ids |= busy
    if herd and len(ids) < 3:
        return ()  # some of them may do something else
    return tuple(sorted(n for n in ids if n))


def _unseen(case: Case, action: Action, sentence: Sentence, *, opening: bool) -> tuple[int, ...]:
    """Return the captions of one whose striking action none of them has; none if few say anything.

    Of the one that all captions describe, one of them would say that it sleeps or eats, or name
    what that takes (a meal, a camera). Where the question asks what it does, two captions suffice.
    """
    known = case.knowledge
    needs = _striking().get(action.stem)
    if needs is None or (case.sample_type == "reasoning" and _is_general(action, sentence)):
        return ()
    asked = opening and _asks_for_action(case)
    if (not needs.isdisjoint(known.words) or any(n in known.boxes for n in needs)) and not (
        asked and _has_unknown_object(case, action, sentence)
    ):
        return ()
    subject, number = _subject(case, action, opening=opening)
    if subject is None or subject not in _ANIMATE:
        return ()
    ids = {n for ids in known.actions_of.get(subject, {}).values() for n in ids}
    if not asked and not _is_alone(case, subject, number):
        return ()
    least = 2 if asked and number == "one" else 3
    return tuple(sorted(ids)) if len(ids) >= least else ()


def _is_general(action: Action, sentence: Sentence) -> bool:
    """Return whether a kind is spoken of: `Cats climb well.`"""
    mention = action.mention
    return (
        mention is not None
        and any(mention is named for named in sentence.mentions)  # not what a pronoun stands for
        and mention.number == "many"
        and determiner(sentence.words, mention.first)[0] == "none"
    )


def _has_unknown_object(case: Case, action: Action, sentence: Sentence) -> bool:
    """Return whether the verb is followed by a noun that neither captions nor boxes have."""
    last = _object_of(sentence, action.index)
    if last is None:
        return False
    for mention in sentence.mentions:
        if mention.first <= last <= mention.last:
            return case.knowledge.support(mention.entry, mention.word) is None
    return noun_name(sentence.words[last]) not in case.knowledge.nouns


def _ridden(case: Case, target: str) -> tuple[int, ...]:
    """Return the captions by which nobody rides this: parked vehicles, people standing by it."""
    knowledge = case.knowledge
    if len(knowledge.boxes.get(target, ())) > 1:
        return ()
    if target in ANIMALS:
        people = knowledge.actions_of.get("person", {})
        found = [ids for stem, ids in people.items() if stem in ("stand", "pet", "feed", "sit")]
    else:
        found = [knowledge.actions_of.get(target, {}).get("park", ())]
    return tuple(sorted({number for ids in found for number in ids if number}))


def _first_mention(case: Case) -> Mention | None:
    """Return the first person or animal that an answer names, if it names no other one."""
    alive = [
        m for _, m in case.answer_reading.mentions
        if m.stance == "asserted" and (
            "person" in m.entry.categories or not _ANIMATE.isdisjoint(m.entry.categories)
        )
    ]  # fmt: skip
    if not alive:
        asked = case.asked
        one = len({m.entry.categories for m in asked}) == 1
        if not one or asked[0].entry.categories[0] not in _ANIMATE:
            return None
        is_animal = asked[0].entry.categories[0] in ANIMALS
        return asked[0] if is_animal or asked[0].number == "one" else None
    return alive[0] if len(alive) == 1 and len(alive[0].entry.categories) == 1 else None


def _swapped(case: Case, action: Action) -> tuple[int, ...]:
    """Return the captions that give this action to the other sex, and another one to this sex."""
    mention = action.mention
    if mention is None or not mention.entry.narrow:
        return ()
    people = wording.load("facts")["people"]
    own, other = people["male"], people["female"]
    if mention.word in other:
        own, other = other, own
    elif mention.word not in own:
        return ()
    doing: dict[str, set[str]] = {"own": set(), "other": set()}
    ids: set[int] = set()
    for caption in case.knowledge.captions:
        for sentence in caption.reading.sentences:
            for known in actions(sentence):
                word = known.mention.word if known.mention else ""
                side = "own" if word in own else "other" if word in other else ""
                if side:
                    doing[side].add(known.stem)
                if side == "other" and known.stem == action.stem:
                    ids.add(caption.id)
    if not ids or action.stem in doing["own"] or not doing["own"]:
        return ()
    return tuple(sorted(n for n in ids if n))


def _subject(case: Case, action: Action, *, opening: bool) -> tuple[str | None, str]:
    """Return whose action it is: a category; and whether one or many are meant."""
    if action.mention is not None:
        return action.subject, action.mention.number
    if action.subject == PRONOUN or (action.subject is None and action.index <= 1):
        for mention in case.asked if opening else ():
            names = mention.entry.categories
            if mention.word in _BACKGROUND:
                return None, "any"
            if len(names) == 1 or "person" in names:
                return ("person" if "person" in names else names[0]), mention.number
    return None, "any"


def _is_alone(case: Case, subject: str, number: str) -> bool:
    """Return whether the captions must speak of the same one."""
    knowledge = case.knowledge
    most = max(knowledge.counts.get(subject, {}), default=1)
    if number == "many":
        return most > 1 and (knowledge.prominent(subject) <= most or not knowledge.has_boxes)
    return knowledge.is_alone(subject)


def _of_same_word(case: Case, action: Action, sentence: Sentence) -> dict[str, tuple[int, ...]]:
    """Return what captions let the same people do, by their word or number: `two women`."""
    mention, knowledge = action.mention, case.knowledge
    if mention is None:
        return {}
    word = f"word {singular(mention.word)}"
    if mention.number == "one":
        same = mention.entry.narrow and word in knowledge.single
    else:
        number = quantity(sentence, mention)
        counts = knowledge.word_counts.get(noun_name(mention.word), {})
        same = number is not None and number.least > 1 and number.least in counts
    return knowledge.actions_of.get(word, {}) if same else {}


def _is_of_another(case: Case, action: Action) -> bool:
    """Return whether every caption with a posture of an animal gives it to another category."""
    if action.subject not in ANIMALS:
        return False
    doing = case.knowledge.actions_of
    others = {
        n
        for name, stems in doing.items()
        if not name.startswith("word ") and name != action.subject
        for n in stems.get(action.stem, ())
    }
    captions = case.knowledge.actions.get(action.stem, ())
    own = doing.get(action.subject or "", {})
    return action.stem not in own and set(captions) <= others


def _is_first(case: Case, sentence: Sentence, named: set[str], action: Action) -> bool:
    """Return whether the subject is the first of its category that the answer names.

    `The cat` of a later sentence is that one where captions only have one cat.
    """
    mention = action.mention
    assert mention is not None
    if mention.word in _BACKGROUND:
        return False
    begin, end = sentence.clause(mention.first)
    around = {*sentence.words[begin : mention.first], *sentence.words[action.index + 1 : end]}
    if not _FAR.isdisjoint(around) and (determiner(sentence.words, mention.first)[0] != "definite"):
        return False  # `a few people stand behind them`
    if named.isdisjoint(mention.entry.categories) or mention.number == "many":
        return True
    same = determiner(sentence.words, mention.first)[0] == "definite"
    return same and not case.knowledge.single.isdisjoint(mention.entry.categories)


def _asks_for_action(case: Case) -> bool:
    words = case.question_reading.words
    up_to = "up" in words and words[words.index("up") + 1 :][:1] == ["to"]
    return up_to or not _ASKING.isdisjoint(case.question_reading.vocabulary)


@cache
def _excluded(person: bool) -> dict[str, frozenset[str]]:
    """Return for every verb those that it excludes, both ways."""
    listed = wording.load("facts")["activities"]
    found: dict[str, set[str]] = {}
    tables = [listed["postures"]] + ([listed["person_postures"]] if person else [])
    for table in tables:
        for stem, others in table.items():
            for other in others:
                found.setdefault(stem, set()).add(other)
                found.setdefault(other, set()).add(stem)
    return {stem: frozenset(others) for stem, others in found.items()}


@cache
def _striking() -> dict[str, frozenset[str]]:
    """Return the actions that captions hardly leave out, with words of which one may stand for it.

    Names of categories among these words stand for boxes.
    """
    listed = wording.load("facts")["activities"]["striking"]
    return {stem: frozenset(words) for stem, words in listed.items()}


@cache
def _tasks() -> tuple[frozenset[str], frozenset[tuple[str, str]]]:
    """Return the actions that fill a person's attention, and the pairs that go together."""
    listed = wording.load("facts")["activities"]
    pairs = [(a, b) for a, b in listed["compatible"]]
    return frozenset(listed["tasks"]), frozenset(pairs + [(b, a) for a, b in pairs])


_POSTURES = frozenset({"sit", "stand", "lie", "walk", "run"})
_ANIMATE = frozenset({"person", *ANIMALS})
_OF_VEHICLES = frozenset({"park", "fly", "drive", "ride", "race"})
_ASKING = word_set("doing position posture activity action happening riding sitting")
_VAGUE = word_set(
    "being having doing using getting trying going taking making putting enjoying finishing "
    "completing performing executing attempting preparing starting"
)
_FAR = word_set("behind background distance")
_BACKGROUND = word_set(
    "spectators spectator audience crowd onlookers passersby others somebody someone"
)
