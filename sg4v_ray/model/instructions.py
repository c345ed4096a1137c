# SPDX-License-Identifier: Apache-2.0
"""What captioners and chat models are asked."""

import hashlib

UNIFIED = "Analyze the image in a comprehensive and detailed manner."
"""The one instruction of Share-Captioner.

Source: ShareGPT4Omni/ShareGPT4V@b6f70e9, tools/share-cap_batch_infer.py.
"""

SHORT_ANSWER = "Answer the question using a single word or phrase."
"""Appended, on a line of its own, to questions whose answer is scored by string match.

Source: ShareGPT4Omni/ShareGPT4V@b6f70e9, the evaluation scripts of VQAv2, GQA and TextVQA.
"""

# The published questions are short and generic; these are ours, in the same spirit. Any change
# changes the text of every dataset built afterwards: append, and give the recipe a new version.
TRAINING_QUESTIONS = (
    UNIFIED,
    "What is in this picture? Tell me everything you can see.",
    "Describe this image thoroughly.",
    "Write a detailed caption for this image.",
    "Please explain what the image shows, in as much detail as possible.",
    "Can you walk me through the contents of this photo?",
    "Give a full account of the scene in the image.",
    "Look closely at the picture and report what it contains.",
    "How would you describe this image to someone who cannot see it?",
    "Describe the objects in this image, what they look like and where they are.",
    "What does this image depict? Be specific.",
    "Provide a rich description of everything visible here.",
)
"""What a training conversation asks before a caption is its answer."""


def training_question(sample_id: str, seed: int) -> str:
    """Choose a question for a sample: the same on every machine and in any order."""
    digest = hashlib.sha256(f"{seed}/{sample_id}".encode()).digest()
    return TRAINING_QUESTIONS[int.from_bytes(digest[:8], "big") % len(TRAINING_QUESTIONS)]
