"""The sentences of the tasks: English, to be replaced for texts of another language."""

from dataclasses import dataclass


@dataclass(frozen=True)
class Fact:
    """A sentence that holds a value, the question for it, and how the answer begins.

    Each has the place {key}; `needle` has {value} too.
    """

    needle: str
    question: str
    answer: str


@dataclass(frozen=True)
class Wording:
    """What the tasks say around and inside of a text.

    Attributes:
        opening: Before the text of the tasks that hide something in it.
        singles: Facts of different forms; a text holds at most one of each.
        fact: The fact of the tasks with several keys.
        facts_question, facts_answer: Question and beginning of the answer where a {key} has several values.
        keys: What the facts are about.
        choice_question: The question with the places {key} and {choices}.
        assignment, alias: Statements of variable tracking, with {name}, {value} and {other}.
        variables_question, variables_answer: Its question, with {value} and {count}, and the beginning of its answer.
        words_opening, words_question, words_answer: Of the list of words, with {count}.
    """

    opening: str = "Some special numbers are hidden in the following text. Remember them; you will be asked.\n\n"
    singles: tuple[Fact, ...] = (
        Fact(
            "The special magic number of {key} is {value}.",
            "What is the special magic number of {key} in the text above?",
            "The special magic number of {key} is",
        ),
        Fact(
            "The telephone number of the {key} is {value}.",
            "What is the telephone number of the {key} in the text above?",
            "The telephone number of the {key} is",
        ),
        Fact(
            "The secret code that opens the {key} is {value}.",
            "What is the secret code that opens the {key} in the text above?",
            "The secret code that opens the {key} is",
        ),
        Fact(
            "The price of the {key}, in dollars, was {value}.",
            "What was the price of the {key}, in dollars, in the text above?",
            "The price of the {key}, in dollars, was",
        ),
    )
    fact: Fact = Fact(
        "One of the special magic numbers for {key} is {value}.",
        "What is the special magic number for {key} in the text above?",
        "The special magic number for {key} is",
    )
    facts_question: str = "What are all the special magic numbers for {key} in the text above?"
    facts_answer: str = "The special magic numbers for {key} are"
    keys: tuple[str, ...] = tuple(
        "airport balloon bicycle bridge cabin camera candle carpet castle cathedral cinema compass cottage dragon "
        "elephant engine factory farm fountain furnace garage garden gallery glacier guitar hammer harbour hospital "
        "hotel island jacket kitchen ladder lantern library lighthouse locker mansion marble mill mirror monastery "
        "museum needle observatory orchard palace parrot piano pyramid railway restaurant safe saddle school station "
        "submarine telescope temple tower tunnel umbrella vault violin volcano wagon warehouse windmill".split()
    )
    choice_question: str = (
        "Which of these is the special magic number for {key} in the text above?\n{choices}\nAnswer with one letter."
    )
    choice_answer: str = "The answer is"
    variables_opening: str = "Variables are assigned in the following text. Remember them; you will be asked.\n\n"
    assignment: str = "VAR {name} = {value}."
    alias: str = "VAR {name} = VAR {other}."
    variables_question: str = "Find all variables that are assigned the value {value} in the text above."
    variables_answer: str = "{count} variables are assigned the value {value}: VAR"
    words_opening: str = "In the following list some words appear more often than others. Remember these.\n\n"
    words_question: str = "What are the {count} most common words in the list above?"
    words_answer: str = "The {count} most common words are"
