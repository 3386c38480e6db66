//! Chat templates as Hugging Face's Jinja environment renders them.

use std::cell::Cell;
use std::fmt;
use std::io;

use minijinja::value::{from_args, Kwargs, Value, ValueKind};
use minijinja::{AutoEscape, Environment, Error, ErrorKind, Output, State};
use minijinja_contrib::pycompat;

use crate::guard::guarded;
use crate::python::{self, JsonStyle};
use crate::{Failure, Outcome, Status};

const NAME: &str = "chat_template";

/// A template can nest values one level a step, and values are compared, shown
/// and dropped by recursion, at up to 440 bytes of stack a level: the stack holds
/// as many levels as there may be steps. It is only touched as far as it is used.
const MAX_STEPS: u64 = 500_000;
const STACK_BYTES: usize = 256 << 20;

#[derive(Clone, Copy)]
pub struct Limits {
    pub max_steps: u64,
    pub max_output: usize,
}

pub struct ChatTemplate {
    environment: Environment<'static>,
}

thread_local! {
    static NOW: Cell<i64> = const { Cell::new(0) };
    // Bytes that expressions may still write, captured text included.
    static WRITABLE: Cell<usize> = const { Cell::new(0) };
}

impl ChatTemplate {
    pub fn new(source: &str) -> Outcome<Self> {
        let source = without_generation_tags(source);
        on_large_stack(move || {
            let mut environment = environment();
            environment
                .add_template_owned(NAME, source)
                .map_err(|e| Failure::invalid(describe(&e)))?;
            Ok(ChatTemplate { environment })
        })
    }

    pub fn render(&self, context: &str, unix_seconds: i64, limits: Limits) -> Outcome<String> {
        on_large_stack(|| {
            NOW.with(|now| now.set(unix_seconds));
            // Captured text is written twice, once when the capture is shown.
            WRITABLE.with(|w| w.set(limits.max_output.saturating_mul(4)));
            let context: serde_json::Value = serde_json::from_str(context)
                .map_err(|e| Failure::invalid(format!("context: {e}")))?;
            let mut environment = self.environment.clone();
            environment.set_fuel(Some(limits.max_steps.min(MAX_STEPS)));
            let mut out = Bounded {
                text: Vec::new(),
                left: limits.max_output,
                overflow: false,
            };
            let result = environment.get_template(NAME).and_then(|t| {
                t.render_captured_to(Value::from_serialize(context), &mut out)
                    .map(|_| ())
            });
            match result {
                Ok(()) => String::from_utf8(out.text).map_err(Failure::invalid),
                Err(_) if out.overflow || WRITABLE.with(Cell::get) == 0 => Err(Failure {
                    status: Status::Limit,
                    message: format!("output exceeds {} bytes", limits.max_output),
                }),
                Err(error) => Err(failure(&error)),
            }
        })
    }
}

fn on_large_stack<T: Send>(work: impl FnOnce() -> Outcome<T> + Send) -> Outcome<T> {
    std::thread::scope(|scope| {
        std::thread::Builder::new()
            .stack_size(STACK_BYTES)
            .spawn_scoped(scope, || guarded(work))
            .map_err(|e| Failure {
                status: Status::Limit,
                message: format!("no thread: {e}"),
            })?
            .join()
            .unwrap_or_else(|_| {
                Err(Failure {
                    status: Status::Bug,
                    message: "the template thread died".into(),
                })
            })
    })
}

fn environment() -> Environment<'static> {
    let mut env = Environment::new();
    env.set_trim_blocks(true);
    env.set_lstrip_blocks(true);
    env.set_auto_escape_callback(|_| AutoEscape::None);
    env.set_unknown_method_callback(method);
    env.set_formatter(show);
    env.add_function("raise_exception", raise_exception);
    env.add_function("strftime_now", strftime_now);
    env.add_filter("tojson", tojson);
    env.add_filter("string", |value: &Value| -> Result<String, Error> {
        let mut text = String::new();
        python::to_str(value, &mut text)?;
        Ok(text)
    });
    env
}

fn show(out: &mut Output, _: &State, value: &Value) -> Result<(), Error> {
    let mut text = String::new();
    let text = match value.as_str() {
        Some(text) => text,
        None => {
            python::to_str(value, &mut text)?;
            &text
        }
    };
    let left = WRITABLE.with(Cell::get).saturating_sub(text.len());
    WRITABLE.with(|w| w.set(left));
    if left == 0 {
        return Err(Error::new(ErrorKind::WriteFailure, "too much output"));
    }
    fmt::Write::write_str(out, text).map_err(Error::from)
}

struct Bounded {
    text: Vec<u8>,
    left: usize,
    overflow: bool,
}

impl io::Write for Bounded {
    fn write(&mut self, bytes: &[u8]) -> io::Result<usize> {
        if bytes.len() > self.left {
            self.overflow = true;
            return Err(io::Error::other("too much output"));
        }
        self.left -= bytes.len();
        self.text.extend_from_slice(bytes);
        Ok(bytes.len())
    }

    fn flush(&mut self) -> io::Result<()> {
        Ok(())
    }
}

/// Marks an error as the template's own refusal.
#[derive(Debug)]
struct Raised(String);

impl fmt::Display for Raised {
    fn fmt(&self, f: &mut fmt::Formatter) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl std::error::Error for Raised {}

fn raise_exception(message: &Value) -> Result<Value, Error> {
    let message = message.to_string();
    Err(Error::new(ErrorKind::InvalidOperation, message.clone()).with_source(Raised(message)))
}

fn failure(error: &Error) -> Failure {
    let mut cause: Option<&(dyn std::error::Error + 'static)> = Some(error);
    while let Some(e) = cause {
        if let Some(raised) = e.downcast_ref::<Raised>() {
            return Failure {
                status: Status::Raised,
                message: raised.0.clone(),
            };
        }
        if e.downcast_ref::<Error>()
            .is_some_and(|e| e.kind() == ErrorKind::OutOfFuel)
        {
            return Failure {
                status: Status::Limit,
                message: "it ran too many steps".into(),
            };
        }
        cause = e.source();
    }
    Failure::invalid(describe(error))
}

fn describe(error: &Error) -> String {
    let what = match error.detail() {
        Some(detail) => format!("{}: {detail}", error.kind()),
        None => error.kind().to_string(),
    };
    match error.line() {
        Some(line) => format!("line {line}: {what}"),
        None => what,
    }
}

fn tojson(value: &Value, kwargs: Kwargs) -> Result<String, Error> {
    let indent = match kwargs.get::<Option<Value>>("indent")? {
        None => None,
        Some(v) if v.is_none() => None,
        Some(v) => match (v.as_usize(), v.as_str()) {
            (Some(n), _) => Some(" ".repeat(n.min(16))),
            (_, Some(s)) => Some(s.chars().take(16).collect()),
            _ => {
                return Err(Error::new(
                    ErrorKind::InvalidOperation,
                    "tojson: bad indent",
                ))
            }
        },
    };
    let mut item_separator = if indent.is_some() { "," } else { ", " }.to_owned();
    let mut key_separator = ": ".to_owned();
    if let Some(separators) = kwargs.get::<Option<Vec<String>>>("separators")? {
        let [item, key] = <[String; 2]>::try_from(separators).map_err(|_| {
            Error::new(
                ErrorKind::InvalidOperation,
                "tojson: separators must be two strings",
            )
        })?;
        (item_separator, key_separator) = (item, key);
    }
    let style = JsonStyle {
        ensure_ascii: kwargs.get::<Option<bool>>("ensure_ascii")?.unwrap_or(false),
        sort_keys: kwargs.get::<Option<bool>>("sort_keys")?.unwrap_or(false),
        indent,
        item_separator,
        key_separator,
    };
    kwargs.assert_all_used()?;
    python::to_json(value, &style)
}

/// Local time, in strftime's own format language.
fn strftime_now(format: &str) -> Result<String, Error> {
    let bad = || Error::new(ErrorKind::InvalidOperation, "strftime_now: bad format");
    if format.is_empty() {
        return Ok(String::new());
    }
    let format = std::ffi::CString::new(format).map_err(|_| bad())?;
    let now = NOW.with(Cell::get) as libc::time_t;
    let mut buffer = [0u8; 1024];
    // SAFETY: plain C calls on values that live here; strftime writes at most
    // the buffer's size and returns the length without the terminator.
    let size = unsafe {
        let mut time: libc::tm = std::mem::zeroed();
        if libc::localtime_r(&now, &mut time).is_null() {
            return Err(bad());
        }
        libc::strftime(
            buffer.as_mut_ptr() as *mut _,
            buffer.len(),
            format.as_ptr(),
            &time,
        )
    };
    Ok(String::from_utf8_lossy(&buffer[..size]).into_owned())
}

/// The Python methods that pycompat lacks and templates use.
fn method(state: &State, value: &Value, name: &str, args: &[Value]) -> Result<Value, Error> {
    if let (ValueKind::String, Some(s)) = (value.kind(), value.as_str()) {
        match name {
            "removeprefix" => {
                let (affix,): (&str,) = from_args(args)?;
                return Ok(Value::from(s.strip_prefix(affix).unwrap_or(s)));
            }
            "removesuffix" => {
                let (affix,): (&str,) = from_args(args)?;
                return Ok(Value::from(s.strip_suffix(affix).unwrap_or(s)));
            }
            "rsplit" => {
                let (separator, max): (&str, Option<i64>) = from_args(args)?;
                if separator.is_empty() {
                    return Err(Error::new(ErrorKind::InvalidOperation, "empty separator"));
                }
                let parts = match max.and_then(|n| usize::try_from(n).ok()) {
                    Some(n) => s
                        .rsplitn(n.saturating_add(1), separator)
                        .collect::<Vec<_>>(),
                    None => s.rsplit(separator).collect(),
                };
                return Ok(parts.into_iter().rev().map(Value::from).collect());
            }
            "partition" | "rpartition" => {
                let (separator,): (&str,) = from_args(args)?;
                let split = if name == "partition" {
                    s.split_once(separator)
                } else {
                    s.rsplit_once(separator)
                };
                let parts = match split {
                    Some((head, tail)) => [head, separator, tail],
                    None if name == "partition" => [s, "", ""],
                    None => ["", "", s],
                };
                return Ok(parts.into_iter().map(Value::from).collect());
            }
            _ => {}
        }
    }
    pycompat::unknown_method_callback(state, value, name, args)
}

/// `{% generation %}` only marks the assistant's text for training; here it is
/// a block that is always taken.
fn without_generation_tags(source: &str) -> String {
    let mut out = String::with_capacity(source.len());
    let mut rest = source;
    while let Some(start) = rest.find("{%") {
        let Some(length) = rest[start..].find("%}") else {
            break;
        };
        let tag = &rest[start + 2..start + length];
        let name = tag.trim_matches(|c: char| c.is_whitespace() || c == '-' || c == '+');
        let replacement = match name {
            "generation" => Some("if true"),
            "endgeneration" => Some("endif"),
            _ => None,
        };
        let end = start + length + 2;
        match replacement {
            Some(new) => {
                out.push_str(&rest[..start + 2]);
                out.push_str(&tag.replacen(name, new, 1));
                out.push_str("%}");
            }
            None => out.push_str(&rest[..end]),
        }
        rest = &rest[end..];
    }
    out.push_str(rest);
    out
}
