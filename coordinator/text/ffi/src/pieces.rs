//! The bytes that each token adds to a running answer, made once.
//!
//! Decoders are functions of a whole list of tokens, but inside a text all
//! common ones give each token the same bytes whatever its neighbours are:
//!   - byte-level BPE: the token's letters stand for bytes, one each;
//!   - byte fallback: `<0xE2>` is a byte, other tokens are text;
//!   - the rest (metaspace, WordPiece, none …): what the token adds between two
//!     others. Placed so, rules for the first and last token (a space stripped,
//!     say) do not touch it.

use tokenizers::{Decoder, DecoderWrapper, Tokenizer};

use crate::{Failure, Outcome};

/// More ids than any vocabulary has, few enough to make a table of them.
const MAX_IDS: u64 = 1 << 24;

pub struct TokenTable {
    pub bytes: Vec<u8>,
    /// One more than there are ids.
    pub offsets: Vec<u32>,
    pub special: Vec<u8>,
    pub replace_per_byte: bool,
}

impl TokenTable {
    pub fn new(tokenizer: &Tokenizer) -> Outcome<Self> {
        let added = tokenizer.get_added_vocabulary();
        let largest = tokenizer.get_vocab(true).into_values().max();
        let size = largest.map_or(0, |id| u64::from(id) + 1);
        if size == 0 {
            return Err(Failure::invalid("the vocabulary is empty"));
        }
        if size > MAX_IDS {
            return Err(Failure::invalid(format!(
                "token id {} is too large: at most {MAX_IDS} ids are supported",
                size - 1
            )));
        }
        let rule = Rule::new(tokenizer.get_decoder());
        let mut table = TokenTable {
            bytes: Vec::new(),
            offsets: vec![0],
            special: Vec::with_capacity(size as usize),
            replace_per_byte: rule.replaces_per_byte(),
        };
        for id in 0..size as u32 {
            let token = tokenizer.id_to_token(id);
            if let Some(token) = &token {
                rule.append(token, &mut table.bytes);
            }
            let end = u32::try_from(table.bytes.len())
                .map_err(|_| Failure::invalid("the vocabulary holds more than 4 GiB of text"))?;
            table.offsets.push(end);
            table
                .special
                .push(token.is_some_and(|t| added.is_special_token(&t)) as u8);
        }
        Ok(table)
    }
}

enum Rule<'a> {
    ByteLevel(Box<ByteLetters>),
    Between(Between<'a>),
}

impl<'a> Rule<'a> {
    fn new(decoder: Option<&'a DecoderWrapper>) -> Self {
        let mut parts = Vec::new();
        if let Some(decoder) = decoder {
            flatten(decoder, &mut parts);
        }
        if parts
            .iter()
            .any(|d| matches!(d, DecoderWrapper::ByteLevel(_)))
        {
            return Rule::ByteLevel(Box::new(ByteLetters::new()));
        }
        let byte_fallback = parts
            .iter()
            .any(|d| matches!(d, DecoderWrapper::ByteFallback(_)));
        Rule::Between(Between::new(decoder, byte_fallback))
    }

    fn replaces_per_byte(&self) -> bool {
        matches!(self, Rule::Between(b) if b.byte_fallback)
    }

    fn append(&self, token: &str, out: &mut Vec<u8>) {
        match self {
            Rule::ByteLevel(letters) => letters.append(token, out),
            Rule::Between(between) => between.append(token, out),
        }
    }
}

fn flatten<'a>(decoder: &'a DecoderWrapper, out: &mut Vec<&'a DecoderWrapper>) {
    match decoder {
        DecoderWrapper::Sequence(sequence) => {
            sequence.get_decoders().iter().for_each(|d| flatten(d, out))
        }
        other => out.push(other),
    }
}

/// GPT-2's alphabet: printable Latin-1 letters stand for themselves, the other
/// 68 bytes for the letters from U+0100 on, in order.
struct ByteLetters {
    byte_of: [Option<u8>; 0x100 + 68],
}

impl ByteLetters {
    fn new() -> Self {
        let mut byte_of = [None; 0x100 + 68];
        let mut next = 0x100;
        for byte in 0..=255u8 {
            let letter = match byte {
                b'!'..=b'~' | 0xA1..=0xAC | 0xAE..=0xFF => byte as usize,
                _ => {
                    next += 1;
                    next - 1
                }
            };
            byte_of[letter] = Some(byte);
        }
        ByteLetters { byte_of }
    }

    /// A token with any other letter (an added one) is its own text.
    fn append(&self, token: &str, out: &mut Vec<u8>) {
        let start = out.len();
        for letter in token.chars() {
            match self.byte_of.get(letter as usize) {
                Some(&Some(byte)) => out.push(byte),
                _ => {
                    out.truncate(start);
                    out.extend_from_slice(token.as_bytes());
                    return;
                }
            }
        }
    }
}

const LEFT: &str = "a";
const RIGHT: &str = "b";

struct Between<'a> {
    decoder: Option<&'a DecoderWrapper>,
    byte_fallback: bool,
    /// What LEFT and RIGHT give where nothing stands between them.
    left: String,
    right: String,
}

impl<'a> Between<'a> {
    fn new(decoder: Option<&'a DecoderWrapper>, byte_fallback: bool) -> Self {
        let mut between = Between {
            decoder,
            byte_fallback,
            left: String::new(),
            right: String::new(),
        };
        between.left = between.decode(&[LEFT]);
        let both = between.decode(&[LEFT, RIGHT]);
        between.right = both
            .strip_prefix(&between.left)
            .unwrap_or_default()
            .to_owned();
        between
    }

    fn decode(&self, tokens: &[&str]) -> String {
        let Some(decoder) = self.decoder else {
            return tokens.join(" ");
        };
        let tokens = tokens.iter().map(|t| t.to_string()).collect();
        decoder
            .decode_chain(tokens)
            .map_or_else(|_| String::new(), |parts| parts.concat())
    }

    fn append(&self, token: &str, out: &mut Vec<u8>) {
        if self.byte_fallback {
            if let Some(byte) = fallback_byte(token) {
                return out.push(byte);
            }
        }
        let text = self.decode(&[LEFT, token, RIGHT]);
        let inner = text
            .strip_prefix(&self.left)
            .and_then(|t| t.strip_suffix(&self.right));
        match inner {
            Some(inner) => out.extend_from_slice(inner.as_bytes()),
            None => out.extend_from_slice(self.decode(&[token]).as_bytes()),
        }
    }
}

fn fallback_byte(token: &str) -> Option<u8> {
    let digits = token.strip_prefix("<0x")?.strip_suffix('>')?;
    (digits.len() == 2).then(|| u8::from_str_radix(digits, 16).ok())?
}
