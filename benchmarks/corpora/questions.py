"""The facts of the World Factbook asked in other words than the corpus has them.

The corpus says "Chile - Capital - name: Santiago"; here it is asked what the capital of Chile is.
A fact whose field has no question is not asked.
"""

import re

from benchmarks.corpora.factbook import Fact

# By field; the fields of years, such as "Exports - Exports 2022", by what stands before the year.
QUESTIONS = {
    # Economy
    "GDP (official exchange rate)": "How large is the GDP of {c} at the official exchange rate?",
    "Exchange rates - Exchange rates": "What was the exchange rate of {c} in {y}?",
    "Exchange rates - Currency": "In which currency are the exchange rates of {c} given?",
    "Real GDP (purchasing power parity) - Real GDP (purchasing power parity)":
        "What was the real GDP of {c} in {y}, at purchasing power parity?",
    "Real GDP per capita - Real GDP per capita":
        "How much was the real GDP of {c} for each inhabitant in {y}?",
    "Real GDP growth rate - Real GDP growth rate":
        "By how much did the real GDP of {c} grow in {y}?",
    "Budget - expenditures": "How much does the state of {c} spend?",
    "Budget - revenues": "How much does the state of {c} take in?",
    "GDP - composition, by sector of origin - industry":
        "Which share of the GDP of {c} comes from industry?",
    "GDP - composition, by sector of origin - services":
        "Which share of the GDP of {c} comes from services?",
    "GDP - composition, by sector of origin - agriculture":
        "Which share of the GDP of {c} comes from agriculture?",
    "Inflation rate (consumer prices) - Inflation rate (consumer prices)":
        "By how much did consumer prices in {c} rise in {y}?",
    "Remittances - Remittances": "How large were the remittances to {c} in {y}?",
    "Industrial production growth rate": "How fast does industrial production in {c} grow?",
    "Exports - Exports": "How much did {c} export in {y}?",
    "Imports - Imports": "How much did {c} import in {y}?",
    "Labor force": "How many people belong to the labor force of {c}?",
    "Unemployment rate - Unemployment rate": "Which share of people in {c} had no work in {y}?",
    "Youth unemployment rate (ages 15-24) - total": "How many young people in {c} have no work?",
    "Youth unemployment rate (ages 15-24) - male": "How many young men in {c} have no work?",
    "Youth unemployment rate (ages 15-24) - female": "How many young women in {c} have no work?",
    "GDP - composition, by end use - household consumption":
        "Which share of the GDP of {c} do households consume?",
    "GDP - composition, by end use - government consumption":
        "Which share of the GDP of {c} does the government consume?",
    "Current account balance - Current account balance":
        "What was the balance of the current account of {c} in {y}?",
    "Reserves of foreign exchange and gold - Reserves of foreign exchange and gold":
        "How much foreign exchange and gold did {c} hold in {y}?",
    "Taxes and other revenues": "How much do taxes and other revenues bring in {c}?",
    "Household income or consumption by percentage share - lowest 10%":
        "Which share of income or consumption has the poorest tenth of households in {c}?",
    "Household income or consumption by percentage share - highest 10%":
        "Which share of income or consumption has the richest tenth of households in {c}?",
    "Population below poverty line": "How many people in {c} live in poverty?",
    "Debt - external - Debt - external": "How much did {c} owe abroad in {y}?",
    "Public debt - Public debt": "How large was the public debt of {c} in {y}?",
    "Average household expenditures - on food": "How much do households in {c} spend on food?",
    "Average household expenditures - on alcohol and tobacco":
        "How much do households in {c} spend on alcohol and tobacco?",
    "Exports - partners": "To which countries does {c} export most?",
    "Imports - partners": "From which countries does {c} import most?",
    "Exports - commodities": "What does {c} export?",
    "Imports - commodities": "What does {c} import?",
    "Industries": "Which industries does {c} have?",
    "Agricultural products": "What do farmers in {c} grow?",
    # Geography
    "Map references": "On which map is {c}?",
    "Land boundaries - total": "How long are the borders of {c} on land?",
    "Geographic coordinates": "At which coordinates lies {c}?",
    "Area - total": "How large is {c}?",
    "Area - land": "How large is the land of {c}, without its water?",
    "Area - water": "How much of the area of {c} is water?",
    "Coastline": "How long is the coast of {c}?",
    "Elevation - lowest point": "Which place in {c} lies lowest?",
    "Elevation - highest point": "Which place in {c} lies highest?",
    "Land use - agricultural land": "Which share of {c} is farmed?",
    "Land use - forest": "Which share of {c} do forests cover?",
    "Irrigated land": "How much land is irrigated in {c}?",
    "Maritime claims - territorial sea": "How wide is the territorial sea of {c}?",
    # People and Society
    "Population - total": "How many people live in {c}?",
    "Population - male": "How many men and boys live in {c}?",
    "Population - female": "How many women and girls live in {c}?",
    "Population growth rate": "How fast does the population of {c} grow?",
    "Nationality - noun": "What are the people of {c} called?",
    "Nationality - adjective": "Which adjective belongs to {c}?",
    "Median age - total": "How old is the median inhabitant of {c}?",
    "Birth rate": "How many births are there in {c}?",
    "Death rate": "How many deaths are there in {c}?",
    "Net migration rate": "How many more people move to {c} than leave it?",
    "Life expectancy at birth - total population": "How long do people in {c} live on average?",
    "Life expectancy at birth - male": "How long do men in {c} live on average?",
    "Life expectancy at birth - female": "How long do women in {c} live on average?",
    "Urbanization - urban population": "Which share of the people of {c} lives in cities?",
    "Infant mortality rate - total": "How many infants die in {c}?",
    "Total fertility rate": "How many children does a woman in {c} have?",
    "Physician density": "How many physicians does {c} have?",
    "Maternal mortality ratio": "How many mothers in {c} die of a birth?",
    "Obesity - adult prevalence rate": "Which share of adults in {c} is obese?",
    "Languages - Languages": "Which languages are spoken in {c}?",
    # Government
    "Capital - name": "What is the capital of {c}?",
    "Capital - geographic coordinates": "At which coordinates lies the capital of {c}?",
    "Country name - conventional long form": "What is the full name of {c}?",
    "Government type": "Which type of government has {c}?",
    "Legislative branch - legislature name": "What is the parliament of {c} called?",
    "Legislative branch - legislative structure": "How many chambers has the parliament of {c}?",
    "National color(s)": "Which are the national colors of {c}?",
    "National symbol(s)": "What is the national symbol of {c}?",
    "National anthem(s) - title": "What is the national anthem of {c} called?",
    "National anthem(s) - lyrics/music": "Who wrote the national anthem of {c}?",
    "Suffrage": "Who may vote in {c}?",
    "Executive branch - chief of state": "Who is the head of state of {c}?",
    "Executive branch - head of government": "Who leads the government of {c}?",
    "Independence": "When did {c} become independent?",
}  # fmt: skip


def kind_of(field: str) -> tuple[str, str]:
    """Return a field without the year that ends it, and that year."""
    name, year = re.fullmatch(r"(.*?)(?: ((?:19|20)\d\d))?", field.strip()).groups()
    return name, year or ""


def question(fact: Fact) -> str | None:
    """Return the question for a fact, None if there is none."""
    name, year = kind_of(fact.field)
    template = QUESTIONS.get(name)
    if template is None or ("{y}" in template) != bool(year):
        return None
    return template.format(c=fact.country, y=year)


def asked(fact: Fact) -> tuple[str, str]:
    """Return the prompt that asks for a fact in other words, and with its answer."""
    prompt = f"Question: {question(fact)}\nAnswer:"
    return prompt, f"{prompt} {fact.value}"
