"""The text that the small tokenizer is trained on, one sentence a line."""

from __future__ import annotations

TRAINING_TEXT = """\
A chat between a curious human and an artificial intelligence assistant.
The assistant gives helpful, detailed, and polite answers to the human's questions.
USER: What is shown in this picture? ASSISTANT: The picture shows a small harbour at low tide.
USER: Describe the image in detail. ASSISTANT: Three boats lie on the sand, and a fourth one floats.
USER: How many people are there, and what are they doing? ASSISTANT: 2 people mend a net.
USER: What colour is the house on the left? ASSISTANT: It is white, with a blue door and a red roof.
USER: Is it raining? ASSISTANT: No, the sky is clear, but the street is still wet.
USER: Read the sign. ASSISTANT: The sign says "Open from 8:30 to 17:45, closed on Mondays".
USER: Thank you! ASSISTANT: You are welcome. Is there anything else that you would like to know?
The image is divided into patches, and every patch becomes one token of the prompt.
The first thing that the eye meets is the old lighthouse, standing on a rock above the water.
In the background, a line of hills disappears into the morning mist.
On the table there are a cup of coffee, a plate of bread and cheese, and an open book.
The woman in the green coat is looking at the camera; the man beside her is looking away.
A brown dog is running after a yellow ball across the grass, while a black cat sleeps in the sun.
The train leaves the station at 6:15, and arrives at 12:07 if nothing goes wrong.
The chart compares 4 countries between 1990 and 2023: the largest grew by 37.5 per cent.
Please list the objects in the photograph, from the left to the right.
1. a bicycle without a front wheel
2. a wooden bench
3. a lamp post, number 96
It seems to be late in the evening, because the shadows are long and the windows are lit.
What would happen if the glass were moved to the edge of the table? It would probably fall.
The answer cannot be given with certainty: the text at the bottom is too blurred to be read.
This is a photograph of the interior of a library, taken from the second floor.
The question has more than one answer, and the assistant should explain why.
Nothing in the scene suggests danger; the people are talking and laughing with each other.
def area(width, height): return width * height
for x in range(10): print(x, x ** 2, "even" if x % 2 == 0 else "odd")
{"name": "photo", "size": [640, 480], "tags": ["sea", "boat"], "score": 0.875}
https://example.org/a/b?c=d&e=f#g <p>hello, world</p> ~ `code` @home $5 \\ | ^ = + - _ ; : ! ?
La photographie montre un petit port de pêche à marée basse, où trois bateaux reposent sur le sable.
Où est passé le garçon qui jouait près de la fenêtre ? Il est peut-être déjà rentré chez lui.
Auf dem Bild sieht man eine Straße mit alten Häusern, und über den Dächern hängt dünner Nebel.
Wie viele Äpfel liegen im Korb? Es sind fünf grüne und zwei größere rote.
La niña pequeña está sentada en el jardín, leyendo un libro sobre los animales del océano.
¿Qué hay encima de la mesa? Hay una taza de café, un plato y tres cucharas.
На фотографии виден старый дом у реки, а рядом с ним стоит белая лодка.
Сколько людей на этой картине? Я вижу двух человек.
Στην εικόνα υπάρχει ένα μικρό λιμάνι με τρεις βάρκες.
这张图片里有什么？图片里有一只小猫和一本书。
你好！请问今天的天气怎么样？天空很蓝，没有下雨。
この写真には何が写っていますか。海と山と小さな船が写っています。
이 사진에는 무엇이 있습니까? 바다와 작은 배가 있습니다.
في الصورة بيت صغير قرب البحر.
The quick brown fox jumps over the lazy dog, and VEXING QUIZ MASTERS KEEP JUMPING BY WALTZ FILM.
"""
