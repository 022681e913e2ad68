//! Events. Work is done when its call returns, so a recorded event is always complete; it stores the time, and what
//! comes before it.

use super::call::{Answer, exports, give, refuse};
use super::codes::Code;
use super::graph;
use super::handles;
use super::order::{self, Clock};
use super::state::{Handle, current, driver};
use super::stream::{self, Stream};
use super::work::Work;
use std::ffi::c_uint;
use std::sync::{Arc, Mutex};
use std::time::Instant;

pub struct Event {
    pub handle: usize,
    pub context: usize,
    timing: bool,
    pub state: Mutex<State>,
}

#[derive(Clone)]
pub enum State {
    /// Never recorded: counts as complete, and waiting for it does nothing.
    Fresh,
    Recorded {
        at: Instant,
        clock: Clock,
    },
    /// Recorded in this capture sequence, after these nodes.
    Captured {
        sequence: u64,
        after: Vec<usize>,
    },
}

const BLOCKING_SYNC: c_uint = 1;
const DISABLE_TIMING: c_uint = 2;
const INTERPROCESS: c_uint = 4;
/// Flag of cuEventRecordWithFlags and cuStreamWaitEvent: in a capture, make a node instead of a dependency.
pub const EXTERNAL: c_uint = 1;

impl Event {
    /// Records it on a stream.
    pub fn stamp(&self, stream: &Stream) -> Answer {
        let clock = order::now(stream)?;
        *self.state.lock().unwrap() = State::Recorded { at: Instant::now(), clock };
        Ok(())
    }

    /// The host has found it complete.
    fn host_waited(&self) -> Answer {
        match &*self.state.lock().unwrap() {
            State::Recorded { clock, .. } => order::host_waited_for(clock),
            _ => Ok(()),
        }
    }
}

fn record(event: Handle, handle: Handle, flags: c_uint) -> Answer {
    let event = driver()?.events.get(event)?;
    let (context, stream) = stream::resolve(handle)?;
    if event.context != stream.context {
        return refuse(Code::INVALID_HANDLE, "the event and the stream belong to different contexts");
    }
    match flags {
        0 => {
            if graph::record_event(&stream, &event)? {
                return Ok(());
            }
            stream.run(&context, &Work::Record(event))
        }
        EXTERNAL => stream::submit(handle, Work::Record(event)),
        _ => refuse(Code::INVALID_VALUE, format!("the flags must be 0 or 1 (external), not {flags:#x}")),
    }
}

/// The time of a recorded event.
fn time(event: &Event, which: &str) -> Answer<Instant> {
    if !event.timing {
        return refuse(Code::INVALID_HANDLE, format!("the {which} event was created without timing"));
    }
    match &*event.state.lock().unwrap() {
        State::Recorded { at, .. } => Ok(*at),
        State::Fresh => refuse(Code::INVALID_HANDLE, format!("the {which} event was never recorded")),
        State::Captured { .. } => {
            refuse(Code::CAPTURED_EVENT, format!("the {which} event was last recorded in a capturing stream"))
        }
    }
}

/// Refuses to synchronise with or query an event that exists in a capture only.
fn refuse_captured(event: &Event) -> Answer {
    let sequence = match &*event.state.lock().unwrap() {
        State::Captured { sequence, .. } => *sequence,
        _ => return Ok(()),
    };
    graph::invalidate(sequence, "a captured event was queried or waited for")?;
    refuse(Code::CAPTURED_EVENT, "the event was last recorded in a capturing stream")
}

fn elapsed(milliseconds: *mut f32, start: Handle, end: Handle) -> Answer {
    let driver = driver()?;
    let (start, end) = (driver.events.get(start)?, driver.events.get(end)?);
    if start.context != end.context {
        return refuse(Code::INVALID_HANDLE, "the two events belong to different contexts");
    }
    let (start, end) = (time(&start, "first")?, time(&end, "second")?);
    let seconds = match end.checked_duration_since(start) {
        Some(duration) => duration.as_secs_f64(),
        None => -start.duration_since(end).as_secs_f64(),
    };
    // SAFETY: the caller of the exported functions guarantees the pointer.
    unsafe { give(milliseconds, (seconds * 1e3) as f32, "the time") }
}

fn destroy(handle: Handle) -> Answer {
    driver()?.events.remove(handle).map(|_: Arc<Event>| ())
}

exports! { EVENT:
    fn cuEventCreate(event: *mut Handle, flags: c_uint) {
        let context = current()?;
        if flags & !(BLOCKING_SYNC | DISABLE_TIMING | INTERPROCESS) != 0 {
            return refuse(Code::INVALID_VALUE, format!("event flags {flags:#x} are not known"));
        }
        if flags & INTERPROCESS != 0 {
            return refuse(Code::NOT_SUPPORTED, "events shared between processes are not emulated");
        }
        let made = Event {
            handle: handles::fresh(),
            context: context.handle,
            timing: flags & DISABLE_TIMING == 0,
            state: Mutex::new(State::Fresh),
        };
        give(event, driver()?.events.insert(made.handle, Arc::new(made)), "the event")
    }

    fn cuEventRecord(event: Handle, stream: Handle) {
        record(event, stream, 0)
    }

    fn cuEventRecordWithFlags(event: Handle, stream: Handle, flags: c_uint) {
        record(event, stream, flags)
    }

    fn cuEventQuery(event: Handle) {
        let event = driver()?.events.get(event)?;
        refuse_captured(&event)?;
        graph::refuse_unsafe_call()?;
        driver()?.contexts.get(event.context as Handle)?.check()?;
        event.host_waited()
    }

    fn cuEventSynchronize(event: Handle) {
        let event = driver()?.events.get(event)?;
        refuse_captured(&event)?;
        graph::refuse_unsafe_call()?;
        let context = driver()?.contexts.get(event.context as Handle)?;
        context.check()?;
        event.host_waited()?;
        super::pool::trim_at_synchronisation(context.device()?);
        Ok(())
    }

    fn cuEventElapsedTime(milliseconds: *mut f32, start: Handle, end: Handle) {
        elapsed(milliseconds, start, end)
    }

    fn cuEventElapsedTime_v2(milliseconds: *mut f32, start: Handle, end: Handle) {
        elapsed(milliseconds, start, end)
    }

    fn cuEventDestroy(event: Handle) {
        destroy(event)
    }

    fn cuEventDestroy_v2(event: Handle) {
        destroy(event)
    }
}

/// For [`super::graph`]: the state of an event that a stream waits for.
pub fn state_of(event: &Event) -> State {
    event.state.lock().unwrap().clone()
}

/// For [`super::graph`]: makes the event stand for these nodes of a capture.
pub fn mark_captured(event: &Event, sequence: u64, after: Vec<usize>) {
    *event.state.lock().unwrap() = State::Captured { sequence, after };
}
