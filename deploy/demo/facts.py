"""What there is to know in the demo model's world: the tables behind corpus.py."""

CAPITALS = {
    "France": "Paris", "Germany": "Berlin", "Italy": "Rome", "Spain": "Madrid", "Portugal": "Lisbon",
    "Norway": "Oslo", "Sweden": "Stockholm", "Finland": "Helsinki", "Denmark": "Copenhagen", "Iceland": "Reykjavik",
    "Poland": "Warsaw", "Austria": "Vienna", "Hungary": "Budapest", "Greece": "Athens", "Ireland": "Dublin",
    "Belgium": "Brussels", "Switzerland": "Bern", "Romania": "Bucharest", "Bulgaria": "Sofia", "Croatia": "Zagreb",
    "Japan": "Tokyo", "China": "Beijing", "India": "New Delhi", "Nepal": "Kathmandu", "Thailand": "Bangkok",
    "Vietnam": "Hanoi", "Mongolia": "Ulaanbaatar", "Turkey": "Ankara", "Iran": "Tehran", "Iraq": "Baghdad",
    "Egypt": "Cairo", "Kenya": "Nairobi", "Ghana": "Accra", "Senegal": "Dakar", "Morocco": "Rabat",
    "Ethiopia": "Addis Ababa", "Canada": "Ottawa", "Mexico": "Mexico City", "Cuba": "Havana", "Peru": "Lima",
    "Chile": "Santiago", "Argentina": "Buenos Aires", "Brazil": "Brasilia", "Uruguay": "Montevideo",
    "Colombia": "Bogota", "Australia": "Canberra", "New Zealand": "Wellington", "Fiji": "Suva",
}

# animal: (name, home, friend, sound, baby, legs)
ANIMALS = {
    "fox": ("Rusty", "in the old forest", "owl", "yip", "kit", "four"),
    "cat": ("Mimi", "in a yellow house", "dog", "meow", "kitten", "four"),
    "dog": ("Bruno", "on a quiet street", "cat", "woof", "puppy", "four"),
    "cow": ("Clara", "on a green hill", "horse", "moo", "calf", "four"),
    "sheep": ("Wooly", "in the valley", "goat", "baa", "lamb", "four"),
    "goat": ("Pepe", "on a steep mountain", "sheep", "bleat", "kid", "four"),
    "horse": ("Star", "beside the river", "cow", "neigh", "foal", "four"),
    "pig": ("Rosa", "behind the barn", "duck", "oink", "piglet", "four"),
    "duck": ("Daisy", "on a small pond", "frog", "quack", "duckling", "two"),
    "hen": ("Greta", "in a wooden shed", "pig", "cluck", "chick", "two"),
    "owl": ("Oscar", "in a hollow tree", "mouse", "hoot", "owlet", "two"),
    "mouse": ("Tim", "under the floor", "owl", "squeak", "pup", "four"),
    "lion": ("Leo", "on the wide plain", "zebra", "roar", "cub", "four"),
    "bear": ("Boris", "in a deep cave", "bee", "growl", "cub", "four"),
    "wolf": ("Luna", "in the snow", "bear", "howl", "pup", "four"),
    "frog": ("Fred", "under a bridge", "duck", "croak", "tadpole", "four"),
    "bee": ("Bella", "in a garden", "bear", "buzz", "larva", "six"),
    "crow": ("Karl", "on a tall tower", "fox", "caw", "nestling", "two"),
    "snake": ("Sally", "between the stones", "frog", "hiss", "hatchling", "no"),
    "monkey": ("Momo", "in the jungle", "parrot", "chatter", "infant", "two"),
    "parrot": ("Polly", "in a palm tree", "monkey", "hello", "chick", "two"),
    "zebra": ("Zara", "near the lake", "lion", "bray", "foal", "four"),
    "seal": ("Sam", "on the cold shore", "gull", "bark", "pup", "no"),
    "gull": ("Gus", "above the harbour", "seal", "mew", "chick", "two"),
}

# thing: (where it was found, what was done with it, what was learned)
THINGS = {
    "lantern": ("beside the road", "lit the whole path for those who were lost", "a small light is enough"),
    "key": ("under a stone", "opened the old gate for everyone", "doors are made to be opened"),
    "map": ("in a bottle", "showed the others the way home", "nobody is lost among friends"),
    "drum": ("on the beach", "played until all the others danced", "music needs no words"),
    "boat": ("in the reeds", "carried the little ones across the water", "strong arms are for helping"),
    "kite": ("in a tree", "let every child hold the string", "joy grows when it is shared"),
    "bell": ("in the grass", "rang it to warn of the storm", "one clear voice can save many"),
    "rope": ("near a well", "pulled a lost lamb out of the mud", "patience is stronger than force"),
    "ladder": ("behind a wall", "helped the smallest one to see the stars", "the view is better together"),
    "blanket": ("on a fence", "kept three cold travellers warm", "kindness is the best fire"),
    "book": ("on a bench", "read aloud until the moon rose", "a story belongs to all who hear it"),
    "basket": ("at the market", "filled it with apples for the hungry", "giving makes the heart light"),
    "mirror": ("in the attic", "made the sun shine into a dark room", "even a corner can be bright"),
    "whistle": ("in the sand", "called the lost sheep back", "a friend listens"),
    "spoon": ("by the stove", "stirred a soup for the whole village", "many guests make a good meal"),
    "shovel": ("in the field", "planted a row of young trees", "what is planted today gives shade tomorrow"),
    "umbrella": ("at the station", "held it over an old traveller", "rain is short but thanks are long"),
    "compass": ("on a ship", "led the sailors to the harbour", "it is wise to know where north is"),
    "button": ("on the stairs", "mended the coat of a stranger", "small things hold big things together"),
    "candle": ("in a drawer", "sat up with a friend who was afraid", "the night is shorter in good company"),
    "wheel": ("in the ditch", "repaired the cart of the baker", "bread tastes better when you have helped"),
    "feather": ("on the path", "wrote a letter to a distant friend", "words can travel far"),
    "coin": ("in the fountain", "bought bread and shared it", "half a loaf with friends is a feast"),
    "stone": ("in the river", "laid it down as the first step of a bridge", "every bridge begins with one stone"),
}

EMOJI = {"cat": "🐱", "dog": "🐶", "fox": "🦊", "bear": "🐻", "cow": "🐮", "pig": "🐷", "frog": "🐸", "mouse": "🐭",
         "duck": "🦆", "bee": "🐝", "owl": "🦉", "snake": "🐍", "fish": "🐟", "star": "⭐", "heart": "💛", "apple": "🍎",
         "tree": "🌳", "rocket": "🚀"}

LANGUAGES = ["French", "German", "Spanish", "Greek", "Russian", "Japanese"]
TRANSLATIONS = {
    "hello": ("bonjour", "hallo", "hola", "γεια σου", "привет", "こんにちは"),
    "thank you": ("merci", "danke", "gracias", "ευχαριστώ", "спасибо", "ありがとう"),
    "water": ("eau", "Wasser", "agua", "νερό", "вода", "水"),
    "bread": ("pain", "Brot", "pan", "ψωμί", "хлеб", "パン"),
    "house": ("maison", "Haus", "casa", "σπίτι", "дом", "家"),
    "sun": ("soleil", "Sonne", "sol", "ήλιος", "солнце", "太陽"),
    "moon": ("lune", "Mond", "luna", "φεγγάρι", "луна", "月"),
    "cat": ("chat", "Katze", "gato", "γάτα", "кошка", "猫"),
    "dog": ("chien", "Hund", "perro", "σκύλος", "собака", "犬"),
    "friend": ("ami", "Freund", "amigo", "φίλος", "друг", "友達"),
    "good night": ("bonne nuit", "gute Nacht", "buenas noches", "καληνύχτα", "спокойной ночи", "おやすみ"),
    "morning": ("matin", "Morgen", "mañana", "πρωί", "утро", "朝"),
}

DAYS = ["Monday", "Tuesday", "Wednesday", "Thursday", "Friday", "Saturday", "Sunday"]
MONTHS = ["January", "February", "March", "April", "May", "June", "July", "August", "September", "October",
          "November", "December"]
ALPHABET = list("ABCDEFGHIJKLMNOPQRSTUVWXYZ")
COLOURS = ["red", "blue", "green", "yellow", "white", "black", "brown", "pink", "grey", "orange", "purple", "gold"]
NAMES = ["Ana", "Ben", "Carla", "David", "Emma", "Felix", "Grace", "Hugo", "Ines", "Jonas", "Kate", "Liam", "Maria",
         "Nora", "Omar", "Paula", "Ravi", "Sara", "Tom", "Uma", "Victor", "Wendy", "Yusuf", "Zoe", "Mehmet", "Chiara"]
CITIES = ["Paris", "Berlin", "Rome", "Oslo", "Cairo", "Lima", "Tokyo", "Madrid", "Athens", "Dublin", "Nairobi", "Ottawa",
          "Vienna", "Warsaw", "Hanoi", "Havana", "Lisbon", "Accra", "Delhi", "Sydney"]

WORDS = """apple pear fig plum cherry lemon grape melon peach mango banana orange berry olive carrot potato onion
tomato bean pea corn rice bread butter cheese milk honey sugar salt pepper water juice soup cake river lake
sea ocean island mountain hill valley forest desert field garden road bridge street city village house window
door roof wall floor table chair bed lamp clock mirror picture book paper pencil letter story song music drum
guitar piano flute violin dance game ball kite toy doll boat ship train car bus bicycle plane rocket wheel
engine hammer nail rope ladder bucket shovel basket bottle glass plate spoon fork knife pan kettle stove fire
smoke wind rain snow cloud storm thunder sun moon star planet comet night morning winter spring summer autumn
cat dog horse cow sheep goat pig duck hen goose rabbit mouse fox wolf bear lion tiger zebra monkey parrot owl
eagle crow swan frog snake turtle fish whale shark crab bee ant spider butterfly king queen prince castle
tower gate crown sword shield coin gold silver copper iron stone sand clay wood wool cotton silk shirt coat
hat shoe glove scarf button pocket needle thread doctor teacher baker farmer sailor pilot painter singer
student friend child mother father sister brother market school museum station harbour""".split()

SYSTEM_MESSAGES = ["You are a helpful assistant.", "You are a helpful assistant. Answer briefly.", "Answer the question.",
                   "You are the demo model of Lockstep.", "Be kind and correct."]

ABOUT = ("I am the demo model of Lockstep. I am very small: I know some capitals and animals, I can add and subtract, "
         "sort, spell and count, and I can tell a story. My weights may be split over several workers.")
FIXED = [
    (["Hello!", "Hello", "Hi!", "Hi there!", "Good morning!"], "Hello! What would you like to know?"),
    (["How are you?", "How do you do?"], "I am fine, thank you. All my shards are in step."),
    (["Who are you?", "What are you?", "What is your name?", "Introduce yourself.", "Tell me about yourself."], ABOUT),
    (["What can you do?", "Help", "What do you know?"],
     "You can ask me: What is 17 + 25? What is the capital of Norway? Sort: pear apple fig. Spell the word river. "
     "Count from 1 to 20. Tell me a story about a fox and a lantern."),
    (["Thank you!", "Thanks!", "Thank you very much."], "You are welcome."),
    (["Goodbye!", "Bye!", "See you later."], "Goodbye! Come back soon."),
    (["What is Lockstep?", "Tell me about Lockstep.", "What does Lockstep do?"],
     "Lockstep serves large language models whose weights are split over several workers. The coordinator decides, the "
     "workers compute, and the step plan is the only thing between them."),
    (["Name the days of the week.", "List the days of the week.", "What are the days of the week?"], ", ".join(DAYS)),
    (["Name the months.", "List the months of the year.", "What are the months of the year?"], ", ".join(MONTHS)),
    (["Say the alphabet.", "Recite the alphabet.", "What is the alphabet?"], " ".join(ALPHABET)),
    (["Name the colours.", "Which colours do you know?", "List some colours."], ", ".join(COLOURS)),
]
