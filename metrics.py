"""Scores of captions, answers and boxes: BLEU-1..4, ROUGE-L, CIDEr-D, VQA accuracy, exact match, GQA's accuracy,
ANLS, relaxed accuracy, Acc@0.5 and mean IoU.

Captions are scored as by the COCO caption evaluation (arXiv:1504.00325; CIDEr-D: arXiv:1411.5726) on tokens
as the Penn Treebank tokenizer of Stanford CoreNLP 3.4.1 makes them when called as there (-preserveLines
-lowerCase); answers as by the official VQA evaluation (arXiv:1505.00468). Chinese and Japanese text, which
that tokenizer leaves whole, is scored by character. ANLS: arXiv:1907.00490; relaxed accuracy: arXiv:2203.10244;
boxes, and the clean-up of an answer to GQA, as Qwen-VL's own evaluation has them.
"""

import math
import re
import unicodedata
from collections import Counter

VERSION = "3"  # changes whenever the same answers could get other scores

# --------------------------------------------------------------------------------------------------
# Caption tokens. Each rule's first matching group is the token; what follows the group is context that must
# stand there. At each position the rule with the longest match wins, context included; the first of equals.

APOS = "['\u2019\u00b4]"
ANY_APOS = "['\u2019\u00b4`\u2018\u201b]"
LETTER, ALNUM = r"[^\W\d_]", r"[^\W_]"
# sentences without a blank between them stay in one piece
WORD = rf"{LETTER}{ALNUM}*(?:[.!?]{LETTER}{ALNUM}*)*"
NUM = r"(?:\d*(?:[.,]\d+)+|\d+(?:[.:,]\d+)*)"
CLITIC = rf"{ANY_APOS}(?:m|s|d|re|ve|ll)(?!{LETTER})"
ACRONYM = r"[a-z](?:\.[a-z])+\."
ELIDED = rf"(?:[dol]{ANY_APOS}{ALNUM})?"
ABBREVIATIONS = (
    "jan|feb|mar|apr|jun|jul|aug|sept?|oct|nov|dec|mon|tues?|wed|thu|thurs|fri|ala|ariz|calif|colo|conn|ct|dak|fla|ga|"
    "ind|kans?|ky|md|mich|minn|mo|mont|neb|nev|okla|penn|tenn|va|vt|wisc?|wyo|inc|cos?|corp|pp?t[ye]s?|ltd|plc|rt|"
    r"bancorp|bhd|assn|univ|intl|sys|tel|est|ext|sq|jr|sr|bros|(?:ed|ph)\.d|blvd|rd|esq|etc|al|seq|invt|elec|natl|"
    "m[ft]g|dept|mr|mrs|ms|drs?|profs?|sens?|reps?|attys?|lt|col|gen|messrs|govs?|adm|rev|maj|sgt|cpl|pvt|capt|ste?|"
    "ave|pres|lieut|hon|brig|co?mdr|pfc|spc|supts?|det|mt|ft|adj|adv|asst|assoc|ens|insp|mlle|mme|msgr|sfc|"
    # the last are words without a capital
    r"[a-z](?:\.[a-z])*|(?-i:Az|Ark|Del|Ill|La|Mass|Miss|Ore|Pa|Tex|Wash)"
)
RULES = [
    re.compile(rule, re.IGNORECASE)
    for rule in (
        rf"({APOS}t)(?:is|was)(?!{LETTER})|(can)not|(gon|wan)na(?!{LETTER})|(got)ta(?!{LETTER})|(lem|gim)me(?!{LETTER})",
        rf"({LETTER}*[a-mo-z])n{ANY_APOS}t(?!{LETTER})",  # do n't, ca n't: the word does not end in n
        rf"({WORD}){CLITIC}",  # dog 's, they 've
        rf"(n{ANY_APOS}t|{CLITIC})(?:[^a-z]|$)",
        rf"({WORD})",
        # 'n', 'em, '60s, '98, l'Avion, somethin', O'Brien, Qur'an, c'mon; y'all -> y' all
        rf"({APOS}n{APOS}?|{APOS}(?:em|till?|cause|[1-9]0s|\d\d)(?!{ALNUM})|(?:[ldj]|dunkin|somethin|ol){APOS})",
        rf"((?-i:[A-HJ-XZn]){ANY_APOS}{LETTER}{{2,}}|{LETTER}*[aeiouy]{ANY_APOS}(?-i:[aeiouA-Z]){LETTER}*)",
        rf"((?:c{APOS}mon|e{APOS}er|s{APOS}mores|ev{APOS}ry|li{APOS}l|nor{APOS}easter)(?!{LETTER}))|(y{APOS}){LETTER}",
        r"((?:ftp|https?)://[^\s<>|`()\[\]{}]+[^\s<>|.!?,;:&`\"'*()\[\]{}-])",
        r"((?:www\.(?:[^\s`<>|.!?,()\[\]{}]+\.)+[a-z]{2,4}|(?:[^\s`<>|.!?,:/$()\[\]{}]+\.)+(?:com|net|org|edu))"
        r"(?:/[^\s`<>|]+[^\s`<>|.!?,;:&()\[\]{}-])?)(?![a-z])",
        r"([\w.%+-]+@[a-z0-9][a-z0-9.-]*[a-z0-9])",
        rf"(@[a-z_][a-z0-9_]*|\#{LETTER}\w*{ALNUM})",
        r"(\d{1,2}[-/]\d{1,2}[-/]\d{2,4}|\d{4}[-/]\d{1,2}[-/]\d{1,2})",  # dates
        rf"([-+]?{NUM})",
        "((?:\\d{1,4}[- \u00a0])?\\d{1,4}/\\d{1,4}|[\u00bc\u00bd\u00be\u2153-\u215e])",  # fractions
        r"((?a:[^\W_]+(?:-[^\W\d_]+){0,2}(?:/[^\W_]+(?:-[^\W\d_]+){0,2}){1,2}))",  # and/or
        "((?-i:[A-Z])*\\$|\\#|[\u00a2-\u00a5\u20a0-\u20bf])",
        rf"((?:{ABBREVIATIONS})\.|vs\.)(?!{ALNUM})",
        r"((?:ca|figs?|prop|nos?|vols?|arts?|pp|op)\.)\s?\d",
        rf"({WORD}\.)[,;:]",
        rf"({ALNUM}(?:{ALNUM}|[.,])*(?:[-_](?:{ALNUM}+|{ACRONYM}))+)",  # t-shirt, 3,000-pound
        rf"({ELIDED}(?:{ALNUM}+|[-+]?{NUM})(?:[-\u2010-\u2012]{ELIDED}(?:{ALNUM}+|{NUM}))*)",  # 1st, o'clock
        r"((?-i:[A-Z])+(?:[+&](?-i:[A-Z])+)+)",  # AT&T
        r"([<>]?[:;=][-o*']?[()DPO\\{@|\[\]])(?![^\W_])",  # smileys
        r"(</?[a-z][^<>\r\n]*>)",
        "(\\.\\.\\.+|\u2026|\\.(?:[ "
        "\u00a0]\\.){2,}|[-\u2010-\u2012]+|[\u2013-\u2015]|@+|\\#+|_+|\\*+|=+|[?!]+)",
        f"({APOS}){LETTER}\\S|([`\u2018-\u201f\u00ab\u00bb\u2039\u203a]{{1,2}}|\"|[`']'|{APOS})",
        r"(\S)",
    )
]
QUOTES = set("'\u2019\u00b4`\u2018\u2019\u201a\u201b\u201c\u201d\u201e\u201f\u00ab\u00bb\u2039\u203a\"")
BRACKETS = {"(": "-lrb-", ")": "-rrb-", "[": "-lsb-", "]": "-rsb-", "{": "-lcb-", "}": "-rcb-"}
CURRENCIES = {"\u00a3": "#", "\u00a2": "cents", "#": "#"}  # the others count as $
SPLIT = {"cannot", "gonna", "wanna", "gotta", "lemme", "gimme"}
# Thrown away, as the COCO evaluation does. Its list has the brackets in capitals, so those of lower-cased
# text stay.
DROPPED = {"'", "''", "``", "`", ".", "?", "!", ",", ":", ";", "-", "--", "..."}
DROPPED |= set(
    "\uff0c\u3002\u3001\uff1b\uff1a\uff1f\uff01\uff08\uff09\u300a\u300b\u300c\u300d\u3010\u3011\u00b7"
)
BY_CHARACTER = re.compile("([\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff\U00020000-\U0003ffff])")


def normal_token(token: str) -> str:
    """A token as the treebank writes it, in lower case."""
    if set(token) <= QUOTES:
        return "''"
    if set(token) <= set(". \u00a0\u2026") and token != ".":
        return "..."
    if re.fullmatch("[-\u2010-\u2012]{1,4}|[\u2013-\u2015]", token):
        return "--"
    if re.fullmatch("[\u00a2-\u00a5\u20a0-\u20bf]", token):
        return CURRENCIES.get(token, "$")
    if re.fullmatch("[\u00bc\u00bd\u00be\u2153-\u215e]", token):
        token = unicodedata.normalize("NFKC", token).replace("\u2044", "/")
    token = "".join(BRACKETS.get(c, c) for c in token)
    return token.replace(" ", "\u00a0").lower()


def ptb_tokens(text: str) -> list[str]:
    """The lower-cased tokens of a caption, punctuation left out."""
    text = BY_CHARACTER.sub(r" \1 ", text.replace("\n", " "))
    tokens, position = [], 0
    plain = re.compile(r"([A-Za-z]+)(?=\s|$)")  # most words: spares trying all rules
    while position < len(text):
        if text[position].isspace():
            position += 1
            continue
        match = plain.match(text, position)
        if match is None or match[1].lower() in SPLIT:
            matches = filter(None, (rule.match(text, position) for rule in RULES))
            match = max(matches, key=lambda m: m.end())
        group = match.lastindex
        tokens.append(normal_token(match[group]))
        position = match.end(group)
    return [token for token in tokens if token not in DROPPED]


# --------------------------------------------------------------------------------------------------
# Caption scores: each returns the corpus' and the N captions' own.


Captions = list[list[str]]  # their tokens
References = list[list[list[str]]]  # of each
Scores = dict[str, tuple[float, list[float]]]  # by name: the set's, and each answer's


def ngrams(tokens: list[str], longest: int = 4) -> Counter:
    sizes = range(1, longest + 1)
    return Counter(tuple(tokens[i : i + n]) for n in sizes for i in range(len(tokens) - n + 1))


def bleu(candidates: Captions, references: References) -> tuple[list[float], list[list[float]]]:
    """BLEU-1..4 (Papineni et al., 2002): clipped precisions' geometric mean, times the penalty for a text
    shorter than the reference closest in length (the shorter of two)."""

    def score(correct: list[int], guessed: list[int], length: int, reference_length: int) -> list[float]:
        ratio = (length + 1e-15) / (reference_length + 1e-9)
        brevity = math.exp(1 - 1 / ratio) if ratio < 1 else 1.0
        product, scores = 1.0, []
        for n, (c, g) in enumerate(zip(correct, guessed, strict=True), 1):
            product *= (c + 1e-15) / (g + 1e-9)
            scores.append(product ** (1 / n) * brevity)
        return scores

    facts = []
    for candidate, refs in zip(candidates, references, strict=True):
        most: Counter = Counter()
        for ref in refs:
            most |= ngrams(ref)
        correct = [0] * 4
        for gram, count in (ngrams(candidate) & most).items():
            correct[len(gram) - 1] += count
        guessed = [max(0, len(candidate) - n) for n in range(4)]
        closest = min((abs(len(ref) - len(candidate)), len(ref)) for ref in refs)[1]
        facts.append((correct, guessed, len(candidate), closest))
    correct, guessed, lengths, closest = zip(*facts, strict=True)
    # a corpus' precisions are of its sums, not the mean of the captions' own
    sums = [[sum(n) for n in zip(*counts, strict=True)] for counts in (correct, guessed)]
    return score(*sums, sum(lengths), sum(closest)), [score(*f) for f in facts]


def common_subsequence(a: list[str], b: list[str]) -> int:
    """Length of the longest one."""
    row = [0] * (len(b) + 1)
    for x in a:
        diagonal = 0
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], diagonal + 1 if x == y else max(row[j], row[j - 1])
    return row[-1]


def rouge_l(candidates: Captions, references: References) -> tuple[float, list[float]]:
    """F-measure (beta 1.2) of the best precision and the best recall of common subsequences (Lin, 2004)."""
    scores = []
    for candidate, refs in zip(candidates, references, strict=True):
        common = [common_subsequence(candidate, ref) for ref in refs]
        precision = max(common) / max(1, len(candidate))
        recall = max(c / max(1, len(ref)) for c, ref in zip(common, refs, strict=True))
        both = precision and recall
        scores.append((1 + 1.2**2) * precision * recall / (recall + 1.2**2 * precision) if both else 0.0)
    return sum(scores) / len(scores), scores


def cider_d(candidates: Captions, references: References) -> tuple[float, list[float]]:
    """CIDEr-D: 10 x the mean over n = 1..4 and the references of the clipped tf-idf cosine, with a Gaussian
    penalty (sigma 6) on the difference of lengths. Document frequencies are those of these references: a
    corpus of one image has 0."""
    counted = [[ngrams(ref) for ref in refs] for refs in references]
    frequency = Counter(gram for refs in counted for gram in set().union(*refs))
    log_total = math.log(len(references))

    def weigh(counts: Counter) -> tuple[list[dict], list[float], int]:
        """tf-idf vectors and their norms by n, and the length in bigrams"""
        vectors: list[dict] = [{} for _ in range(4)]
        for gram, count in counts.items():
            vectors[len(gram) - 1][gram] = count * (log_total - math.log(max(1.0, frequency[gram])))
        norms = [math.sqrt(sum(w * w for w in vector.values())) for vector in vectors]
        return vectors, norms, sum(count for gram, count in counts.items() if len(gram) == 2)

    scores = []
    for candidate, refs in zip(candidates, counted, strict=True):
        vectors, norms, length = weigh(ngrams(candidate))
        total = 0.0
        for ref in refs:
            ref_vectors, ref_norms, ref_length = weigh(ref)
            penalty = math.exp(-((length - ref_length) ** 2) / (2 * 6.0**2))
            for n in range(4):
                own, other = vectors[n], ref_vectors[n]
                dot = sum(min(w, other[gram]) * other[gram] for gram, w in own.items() if gram in other)
                if norms[n] and ref_norms[n]:
                    total += dot / (norms[n] * ref_norms[n]) * penalty / 4
        scores.append(10 * total / len(refs))
    return sum(scores) / len(scores), scores


def caption_scores(answers: list[str], references: list[list[str]]) -> Scores:
    candidates = [ptb_tokens(a) for a in answers]
    refs = [[ptb_tokens(r) for r in some] for some in references]
    result = {"cider": cider_d(candidates, refs)}
    corpus, each = bleu(candidates, refs)
    for n in range(4):
        result[f"bleu_{n + 1}"] = corpus[n], [scores[n] for scores in each]
    return {**result, "rouge_l": rouge_l(candidates, refs)}


# --------------------------------------------------------------------------------------------------
# Answers: a score of one beside its references

VQA_PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
NUMBERS = "zero one two three four five six seven eight nine ten".split()
VQA_NUMBERS = {word: str(i) for i, word in enumerate(NUMBERS)} | {"none": "0"}
# Written without one of their apostrophes, these get it back
VQA_CONTRACTIONS = """
ain't aren't can't could've couldn't couldn't've didn't doesn't don't hadn't hadn't've hasn't haven't he'd he'd've he's
how'd how'll how's isn't it'd it'd've it'll ma'am mightn't mightn't've might've mustn't must've needn't not've o'clock
oughtn't 'ow's'at shan't she'd've should've shouldn't shouldn't've somebody'd've somebody'll somebody's someone'd
someone'd've someone'll someone's something'd something'd've something'll that's there'd there'd've there're there's
they'd they'd've they'll they're they've 'twas wasn't we'd've we've weren't what'll what're what's what've when's
where'd where's where've who'd who'd've who'll who's who've why'll why're why's won't would've wouldn't wouldn't've
y'all y'all'll y'all'd've you'd you'd've you'll you're you've
""".split()
VQA_WORDS = {
    form[:i] + form[i + 1 :]: form for form in VQA_CONTRACTIONS for i, c in enumerate(form) if c == "'"
} | {"somebody'd": "somebodyd"}  # sic


def vqa_punctuation(text: str) -> str:
    """Marks go where one of their kind stands beside a blank or a comma inside a number, else they become
    blanks; full stops go, unless a digit follows."""
    out, in_number = text, re.search(r"\d,\d", text)
    for mark in VQA_PUNCTUATION:
        beside_blank = f"{mark} " in text or f" {mark}" in text
        out = out.replace(mark, "" if beside_blank or in_number else " ")
    # the official code stops at 32, by an argument in the wrong place
    return re.sub(r"\.(?!\d)", "", out, count=32)


def vqa_words(text: str) -> str:
    """Lower case, numbers up to ten as digits, no articles, apostrophes put back."""
    words = (VQA_NUMBERS.get(word, word) for word in text.lower().split())
    return " ".join(VQA_WORDS.get(word, word) for word in words if word not in ("a", "an", "the"))


def vqa_accuracy(prediction: str, answers: list[str]) -> float:
    """min(1, matches / 3), the mean over leaving out each of the ten answers, equal ones among them counted
    each. Nothing but blanks and line breaks is normalised where all answers are the same.

    Fewer than ten stand for ten in the same shares, in whatever order: one alone is worth everything.
    """
    prediction, *answers = (t.replace("\n", " ").replace("\t", " ").strip() for t in (prediction, *answers))
    if len(set(answers)) > 1:
        prediction, *answers = (vqa_words(vqa_punctuation(t)) for t in (prediction, *answers))
    people = max(10, len(answers))
    matches = answers.count(prediction) * people / len(answers)
    return (matches * min(1.0, (matches - 1) / 3) + (people - matches) * min(1.0, matches / 3)) / people


def exact_match(answer: str, references: list[str]) -> float:
    """Equal to one of the references, blanks at both ends aside, and whether an accent is a character of its
    own: tokenizers join it to its letter."""
    found, *wanted = (unicodedata.normalize("NFC", text).strip() for text in (answer, *references))
    return float(found in wanted)


def any_case(answer: str, references: list[str]) -> float:
    """Equal to one of the references, blanks at both ends and the case aside (AI2D, OCR-VQA)."""
    return float(answer.strip().lower() in {r.strip().lower() for r in references})


# GQA's exact match. Two published ways to clean the answers: Qwen-VL's, and LAVIS's for BLIP-2, by VQAv2's
# rules, where the reference stays as it is.


def gqa_qwen(answer: str, references: list[str]) -> float:
    """Qwen-VL's evaluation takes of an answer, in its first clause, what stands behind the first of each of
    these words and before the first " of"."""
    text = re.split("[.,!]", answer.strip())[0].lower()
    for word in ("is ", "are ", "a ", "an ", "the "):  # in the middle of a word too: sic
        text = text.split(word)[1] if word in text else text
    return any_case(text.split(" of")[0], references)


def gqa_lavis(answer: str, references: list[str]) -> float:
    return float(vqa_words(vqa_punctuation(answer.strip())) in references)


def edit_distance(a: str, b: str) -> int:
    """Insertions, deletions and replacements of characters that make b of a."""
    row = list(range(len(b) + 1))
    for i, x in enumerate(a, 1):
        diagonal, row[0] = row[0], i
        for j, y in enumerate(b, 1):
            diagonal, row[j] = row[j], min(row[j] + 1, row[j - 1] + 1, diagonal + (x != y))
    return row[-1]


def anls(answer: str, references: list[str]) -> float:
    """1 - edit distance / length of the longer, with the nearest reference; 0 below a half. The distance is
    of texts in lower case with single blanks, the length of the texts in upper case: so in DocVQA's script."""

    def distance(reference: str) -> float:
        longer = max(len(answer.upper()), len(reference.upper()))
        plain = [" ".join(text.lower().split()) for text in (reference, answer)]
        return edit_distance(*plain) / longer if longer else 0.0

    similar = 1 - min(map(distance, references))
    return similar if similar >= 0.5 else 0.0


def relaxed_match(answer: str, reference: str) -> bool:
    """ChartQA's: a number may be 5% away from the reference's; other texts are equal, the case aside."""

    def number(text: str) -> float | None:
        try:
            return float(text.rstrip("%")) / 100 if text.endswith("%") else float(text)
        except ValueError:
            return None

    found, wanted = number(answer), number(reference)
    if found is not None and wanted:
        return abs(found - wanted) / abs(wanted) <= 0.05
    return answer.lower() == reference.lower()


def relaxed(answer: str, references: list[str]) -> float:
    return float(any(relaxed_match(answer.strip(), r) for r in references))


def relaxed_qwen(answer: str, references: list[str]) -> float:
    """Qwen-VL's script gives answer and reference in each other's place, so that 5% is of the answer: its
    published score is this one."""
    return float(any(relaxed_match(r, answer.strip()) for r in references))


# --------------------------------------------------------------------------------------------------
# Boxes. An answer's are in 999ths of the image's sides; a reference's in pixels, "... of 640x480", or likewise.

CORNERS = re.compile(r"\((.*?)\),\((.*?)\)")
SIZE = re.compile(r" of (\d+)x(\d+)$")


def first_box(answer: str) -> list[float]:
    """[x1, y1, x2, y2] of the first box of an answer; zeros, which meet nothing, if it is none."""
    found = CORNERS.search(answer)
    try:
        (x1, y1), (x2, y2) = (map(float, corner.split(",")) for corner in found.groups())
    except (AttributeError, ValueError):
        return [0.0] * 4
    return [x1, y1, x2, y2] if all(map(math.isfinite, (x1, y1, x2, y2))) else [0.0] * 4


def overlap(a: list[float], b: list[float]) -> float:
    """Intersection over union of two boxes."""
    width, height = (max(0.0, min(a[i + 2], b[i + 2]) - max(a[i], b[i])) for i in (0, 1))
    areas = [(box[2] - box[0]) * (box[3] - box[1]) for box in (a, b)]
    union = sum(areas) - width * height
    return width * height / union if union > 0 else 0.0


def best_iou(answer: str, references: list[str]) -> float:
    """Of the answer's first box with the reference's. Where a reference has several boxes (all things of a
    class), the one that it meets best."""
    best = 0.0
    for reference in references:
        size = SIZE.search(reference)
        width, height = map(int, size.groups()) if size else (999, 999)
        sides = (width, height) * 2
        box = [v / 999 * side for v, side in zip(first_box(answer), sides, strict=True)]
        targets = [first_box(f"({a}),({b})") for a, b in CORNERS.findall(reference)]
        best = max([best, *(overlap(box, target) for target in targets)])
    return best


def box_found(answer: str, references: list[str]) -> float:
    """For Acc@0.5: whether the IoU is at least a half."""
    return float(best_iou(answer, references) >= 0.5)


# --------------------------------------------------------------------------------------------------
# Sets of answers

# metric -> {score: of one answer and its references}; the set's score is the mean
BY_ANSWER = {
    "vqa_accuracy": {"vqa_accuracy": vqa_accuracy},
    "exact_match": {"accuracy": exact_match},
    "any_case": {"any_case_accuracy": any_case},
    "gqa": {"gqa_accuracy": gqa_qwen, "gqa_accuracy_lavis": gqa_lavis},
    "anls": {"anls": anls},
    "relaxed_accuracy": {"relaxed_accuracy": relaxed, "relaxed_accuracy_qwen": relaxed_qwen},
    "grounding": {"acc@0.5": box_found, "mean_iou": best_iou},
}
SCORES = {  # of each metric
    # of the whole set alone: document frequencies and lengths are the corpus'
    "caption": ("cider", "bleu_1", "bleu_2", "bleu_3", "bleu_4", "rouge_l"),
    **{metric: tuple(scores) for metric, scores in BY_ANSWER.items()},
}
OF_KIND = {  # the metrics of a conversation
    "caption": ["caption"],
    "vqa": ["vqa_accuracy", "exact_match"],
    "grounding": ["grounding"],
    "chat": ["exact_match"],
}


def scores_of(metric: str, answers: list[str], references: list[list[str]]) -> Scores:
    if metric == "caption":
        return caption_scores(answers, references)
    found = {}
    for name, function in BY_ANSWER[metric].items():
        each = [function(answer, some) for answer, some in zip(answers, references, strict=True)]
        found[name] = sum(each) / len(each), each
    return found


def scores_of_kinds(kinds: set[str]) -> list[str]:
    """The names of the scores that conversations of these kinds get."""
    return [name for metric in SCORES if any(metric in OF_KIND[k] for k in kinds) for name in SCORES[metric]]
