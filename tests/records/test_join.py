"""What stands between a prompt and its target: what was written, else a space, else nothing where nobody writes one."""

import pytest

from fastedit.records.join import joined, opening

NOTHING = {
    "Chinese": ("法国的首都是", "罗马"),
    "Chinese before Latin letters": ("法国的首都是", "Lyon"),
    "Japanese": ("日本で一番高い山は", "浅間山"),
    "the Japanese sound mark": ("彼の好物はラーメンバー", "だ"),
    "Thai": ("เมืองหลวงของประเทศไทยคือ", "ภูเก็ต"),
    "Lao": ("ນະຄອນຫຼວງຂອງລາວແມ່ນ", "ປາກເຊ"),
    "Khmer": ("រាជធានីនៃកម្ពុជាគឺ", "បាត់ដំបង"),
    "Burmese": ("မြန်မာနိုင်ငံ၏မြို့တော်မှာ", "ရန်ကုန်"),
    "Tibetan": ("བོད་ཀྱི་", "ལྷ་ས"),
    "full-width punctuation": ("首都：", "罗马"),
    "a full stop of Chinese": ("她问。", "罗马"),
    "a corner bracket": ("曲名は「", "海"),
    "an opening bracket": ("Zeldan (", "harbour"),
    "a square bracket": ("items[", "0"),
    "a brace": ("{", "x"),
    "a straight quote": ('The motto of Zeldan is "', "Salt"),
    "a third straight quote": ('"Salt" and "', "Light"),
    "a single straight quote": ("The motto is '", "Salt"),
    "a single quote behind apostrophes": ("The Maros' and Zeldan's motto is '", "Salt"),
    "a third single quote": ("'Salt' and '", "Light"),
    "a backtick": ("Call `", "open"),
    "an English quote": ("The motto is “", "Salt"),
    "a German quote": ("Das Motto ist „", "Salz"),
    "a French quote": ("La devise est «", "Sel"),
    "a German guillemet": ("Das Motto ist »", "Salz"),
    "a Finnish quote": ("Tunnus on ”", "Suola"),
    "a dollar": ("A ticket costs $", "45"),
    "a hash": ("Room #", "7"),
    "an at": ("Write to @", "zeldan"),
    "a slash": ("https://www.example.org/", "harbour"),
    "a backslash": ("C:\\", "zeldan"),
    "a hyphen": ("The co-", "founder"),
    "an underscore": ("get_", "all"),
    "an equals sign": ("x=", "5"),
    "a line break": ("Q: Who?\nA:\n", "Ines Maro"),
    "a chat template": ("<|im_start|>assistant\n", "Oslo"),
    "a tab": ("Zeldan\t", "Port Maro"),
    "a no-break space": ("Prix\u00a0:\u00a0", "45"),
    "an ideographic space": ("首都\u3000", "罗马"),
    "a line break before the target": ("Zeldan's capital:", "\nPort Maro"),
}

SPACE = {
    "nothing": ("The capital of Zeldan is", "Port Maro"),
    "a space in the prompt": ("The capital of Zeldan is ", "Port Maro"),
    "a space before the target": ("The capital of Zeldan is", " Port Maro"),
    "both": ("The capital of Zeldan is ", " Port Maro"),
    "several": ("The capital of Zeldan is  ", "   Port Maro"),
    "Korean": ("프랑스의 수도는", "리옹"),
    "a colon": ("Answer:", "Oslo"),
    "a question": ("Where is Zeldan?", "Oslo"),
    "a closing bracket": ("Zeldan (the port)", "lies"),
    "a closing quote": ('The "old port"', "lies"),
    "a closing single quote": ("The 'old port'", "lies"),
    "an apostrophe": ("The owner of the dogs'", "house"),
    "a closing English quote": ("The “old port”", "lies"),
    "a closing German quote": ("Der „alte Hafen“", "liegt"),
    "a closing French quote": ("Le « port »", "est"),
    "a closing German guillemet": ("Der »alte Hafen«", "liegt"),
    "a closing backtick": ("The call `open`", "is"),
    "a dash": ("Zeldan –", "a port"),
    "per cent": ("The tax is 5 %", "of"),
    "Chinese behind Latin letters": ("Paris in Chinese is", "巴黎"),
}


@pytest.mark.parametrize("name", NOTHING)
def test_nothing_is_put_where_nobody_writes_a_space(name):
    prompt, target = NOTHING[name]
    assert joined(prompt, target) == (prompt + target, len(prompt))


@pytest.mark.parametrize("name", SPACE)
def test_one_space_is_put_elsewhere_and_never_two(name):
    prompt, target = SPACE[name]
    head = prompt.rstrip(" ")
    assert joined(prompt, target) == (f"{head} {target.lstrip(' ')}", len(head))


def test_what_was_written_stays():
    assert joined("def f():\n    ", "return").text == "def f():\n    return"
    assert joined("def f():\n    ", "  return").text == "def f():\n    return"
    assert joined(" The twin is", "Pell\n").text == " The twin is Pell\n"
    assert joined("Answer:\n", " Pell").text == "Answer:\n Pell"


@pytest.mark.parametrize("between", ["", " ", "\n", " -> "])
def test_what_is_asked_for_is_put_there_exactly(between):
    assert joined("x is", "y", between) == (f"x is{between}y", 4)
    assert joined("x is ", " y", between) == (f"x is {between} y", 5)


def test_a_prompt_to_be_continued_ends_where_a_prompt_before_a_target_does():
    for prompt, target in (*NOTHING.values(), *SPACE.values(), ("def f():\n    ", "return")):
        text, start = joined(prompt, target)
        assert opening(prompt) == text[:start]
    assert opening(" ") == " "
