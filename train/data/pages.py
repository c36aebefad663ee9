"""The text that a page of HTML shows."""

NOT_SHOWN = (  # selectors; the parser knows of scripts by itself
    "head, iframe, noembed, noframes, template, title",
    "[hidden], [style*='display:none' i], [style*='display: none' i]",
    "area, audio, canvas, img, object, svg, video",
    "button, datalist, input, select, textarea",
)


def text_of_page(page: str) -> str:
    """Return the text of a page, in lines as the page has it."""
    from resiliparse.extract.html2text import extract_plain_text

    # Without alt_texts it leaves out figures, with all that is in them, without form_fields labels.
    text = extract_plain_text(
        page,
        preserve_formatting=True,
        alt_texts=True,
        form_fields=True,
        skip_elements=[*NOT_SHOWN],
    )
    return str(text).strip("\n")
