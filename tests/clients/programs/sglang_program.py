"""SGLang's language against a running server: generated, streamed, held to an expression, and chosen."""

import os

import sglang as sgl


@sgl.function
def answer(s, question):
    s += sgl.system("You are helpful.")
    s += sgl.user(question)
    s += sgl.assistant(sgl.gen("answer", max_tokens=12, stop="\n"))


@sgl.function
def digits(s):
    s += "My phone number is " + sgl.gen("digits", max_tokens=20, regex="[0-9]{3}")


@sgl.function
def choose(s):
    s += "The colour of the sky is" + sgl.select("colour", [" blue", " seven"])


sgl.set_default_backend(sgl.RuntimeEndpoint(os.environ["URL"]))
assert answer.run(question="Name a colour.", temperature=0)["answer"]
assert "".join(answer.run(question="Name a colour.", stream=True).text_iter("answer"))
assert digits.run()["digits"].isdigit()
assert choose.run()["colour"] == " blue"
print("answered")
