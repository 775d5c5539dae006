"""What two published processors make of an answer before answers are compared.

Both keep the quirks of their programs, on which published numbers rest: a full stop goes unless a digit follows it,
and at most 32 of them go, since `re.UNICODE` stands where `re.sub` takes a count.
"""

from __future__ import annotations

import re

ARTICLES = {"a", "an", "the"}
DIGITS = ("zero", "one", "two", "three", "four", "five", "six", "seven", "eight", "nine", "ten")
NUMBERS = {"none": "0"} | {word: str(value) for value, word in enumerate(DIGITS)}
PUNCTUATION = ';/[]"{}()=+\\_-><@`,?!'
"""The present list of VQA's program; an older one has `:` and `'`, and neither braces, `-` nor `!`."""
FULL_STOP = re.compile(r"\.(?!\d)")
FULL_STOPS_AT_MOST = int(re.UNICODE)
COMMA_IN_NUMBER = re.compile(r"\d,\d")

# Published spelling without an apostrophe, or with one of two, and what it becomes. Of the published list four words
# with a capital letter are left out, which are never met in lower text, and two that become themselves.
_PAIRS = re.findall(
    r"\S+",
    """
aint ain't arent aren't cant can't couldve could've couldnt couldn't couldn'tve couldn't've couldnt've couldn't've
didnt didn't doesnt doesn't dont don't hadnt hadn't hadnt've hadn't've hadn'tve hadn't've hasnt hasn't havent haven't
hed he'd hed've he'd've he'dve he'd've hes he's howd how'd howll how'll hows how's isnt isn't itd it'd itd've it'd've
it'dve it'd've itll it'll maam ma'am mightnt mightn't mightnt've mightn't've mightn'tve mightn't've mightve might've
mustnt mustn't mustve must've neednt needn't notve not've oclock o'clock oughtnt oughtn't ow's'at 'ow's'at
'ows'at 'ow's'at 'ow'sat 'ow's'at shant shan't shed've she'd've she'dve she'd've shouldve should've shouldnt shouldn't
shouldnt've shouldn't've shouldn'tve shouldn't've somebody'd somebodyd somebodyd've somebody'd've
somebody'dve somebody'd've somebodyll somebody'll somebodys somebody's someoned someone'd someoned've someone'd've
someone'dve someone'd've someonell someone'll someones someone's somethingd something'd somethingd've something'd've
something'dve something'd've somethingll something'll thats that's thered there'd thered've there'd've
there'dve there'd've therere there're theres there's theyd they'd theyd've they'd've they'dve they'd've theyll they'll
theyre they're theyve they've twas 'twas wasnt wasn't wed've we'd've we'dve we'd've weve we've werent weren't
whatll what'll whatre what're whats what's whatve what've whens when's whered where'd wheres where's whereve where've
whod who'd whod've who'd've who'dve who'd've wholl who'll whos who's whove who've whyll why'll whyre why're whys why's
wont won't wouldve would've wouldnt wouldn't wouldnt've wouldn't've wouldn'tve wouldn't've yall y'all yall'll y'all'll
y'allll y'all'll yall'd've y'all'd've y'alld've y'all'd've y'all'dve y'all'd've youd you'd youd've you'd've
you'dve you'd've youll you'll youre you're youve you've
""",
)
CONTRACTIONS = dict(zip(_PAIRS[::2], _PAIRS[1::2], strict=True))


def without_punctuation(text: str) -> str:
    """Removes a mark that stands at a space anywhere in the text, puts a space for one that does not.

    All marks go without a space where the text holds a number with a comma.

    Source: `processPunctuation` of https://github.com/GT-Vision-Lab/VQA.

    Example:
        >>> without_punctuation("1,000"), without_punctuation("red/blue"), without_punctuation("U.S.A.")
        ('1000', 'red blue', 'USA')
    """
    in_number = COMMA_IN_NUMBER.search(text) is not None
    result = text
    for mark in PUNCTUATION:
        at_space = f"{mark} " in text or f" {mark}" in text
        result = result.replace(mark, "" if at_space or in_number else " ")
    return FULL_STOP.sub("", result, count=FULL_STOPS_AT_MOST)


def without_articles(text: str) -> str:
    """Lowers, writes numbers as digits and contractions with their apostrophe, and leaves articles out.

    Source: `processDigitArticle` of https://github.com/GT-Vision-Lab/VQA.

    Example:
        >>> without_articles("The two dogs dont")
        "2 dogs don't"
    """
    words = [NUMBERS.get(word, word) for word in text.lower().split()]
    return " ".join(CONTRACTIONS.get(word, word) for word in words if word not in ARTICLES)


def plain_spaces(text: str) -> str:
    """Puts spaces for line breaks and tabs, and strips."""
    return text.replace("\n", " ").replace("\t", " ").strip()


def vqa_answer(text: str) -> str:
    """Normalises an answer as VQAv2's program does a prediction.

    Example:
        >>> vqa_answer("It's 3.5 m")
        "it's 3.5 m"
    """
    return without_articles(without_punctuation(plain_spaces(text)))


def evalai_answer(text: str) -> str:
    """Normalises an answer as the EvalAI processor of M4C does, with which TextVQA is scored.

    Example:
        >>> evalai_answer("It's 3.5 m")
        "it 's 3.5 m"
    """
    words = text.lower().replace(",", "").replace("?", "").replace("'s", " 's").strip()
    return vqa_answer(words)
