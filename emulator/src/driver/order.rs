//! The check `stream_order`: accesses to device memory from two streams, at least one of them a write, that nothing
//! orders.
//!
//! Work runs inside the call that submits it, so a missing wait never shows in the results. This check finds it by
//! vector clocks. Each item of a stream has a number, and a [`Clock`] says, by stream, up to which number items come
//! before. What orders:
//!
//! - the stream itself; a graph is one item of the stream that launches it, and comes after its own last launch;
//! - an event, which keeps the clock of its stream from its last record, for the streams that wait for it;
//! - the legacy stream, which waits for all blocking streams of its context, as these and the threads' default streams
//!   wait for it;
//! - the host: it learns the clock of what it synchronises with, queries with success or is called by as a host
//!   function, and every item begins with what the host knows. There is one host clock for the whole process, since
//!   threads of a program tell each other what they have waited for in ways that are not seen here.
//!
//! A call without `Async` counts as waited for, as does all work of a context when something is freed, even where the
//! manual does not promise it. So does a copy from a device to pageable host memory, where it does.
//!
//! Per allocation, ranges of bytes have the accesses that later ones may still meet. Copies and fills count row by row,
//! by the byte. Kernels count by sectors of 32 bytes: two of them meet in a sector only if one has accessed all of it
//! with one instruction of a warp, a kernel and a copy only if one of both has all of it ([`Extent`]). So nothing is
//! reported that does not meet in a byte. Atomic and volatile accesses do not conflict with each other. To allocate or
//! free memory in stream order is to write all of it, as the manual lets nobody use it before or after; memory from
//! other calls has no history.
//!
//! Not here: what the host itself reads and writes, so neither pinned memory that it touches too early nor what it
//! learns by polling memory; accesses of the nodes of one graph to the same memory; kernels on two streams that share
//! sectors bit by bit.

use super::call::{Answer, Refusal};
use super::codes::Code;
use super::settings::Run;
use super::state::{Context, driver};
use super::stream::{Role, Stream};
use crate::exec::Span;
use std::collections::{BTreeMap, HashMap};
use std::sync::{Arc, MutexGuard, PoisonError};

/// By stream (its handle): the number of its last item that comes before.
pub type Clock = BTreeMap<usize, u64>;

/// All clocks and accesses of the process.
#[derive(Default)]
pub struct Order {
    host: Clock,
    /// Streams that have had work. One that is gone came before everything.
    streams: BTreeMap<usize, Known>,
    /// Accesses by the first address of the allocation.
    histories: HashMap<u64, History>,
}

struct Known {
    context: usize,
    role: Role,
    clock: Clock,
}

/// How much of a range an access has touched.
#[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Debug)]
enum Extent {
    /// Some bytes of each sector.
    Some,
    /// All of the range, but not all of its sectors.
    Range,
    /// All of the sectors.
    Sectors,
}

#[derive(Clone, PartialEq)]
struct Access {
    what: Arc<str>,
    stream: usize,
    time: u64,
    write: bool,
    strong: bool,
    extent: Extent,
}

#[derive(Default)]
struct History {
    /// The allocation: another one at the same address starts afresh.
    serial: u64,
    /// Ranges without overlap, by their first byte.
    cells: BTreeMap<u64, Cell>,
}

struct Cell {
    end: u64,
    accesses: Vec<Access>,
}

const SECTOR: u64 = 32;

fn join(clock: &mut Clock, other: &Clock) {
    for (&stream, &time) in other {
        let known = clock.entry(stream).or_default();
        *known = time.max(*known);
    }
}

impl Access {
    /// Whether both access some byte of a range that both have, one writes, and they are not made for that.
    fn conflicts(&self, other: &Access) -> bool {
        let meet = match (self.extent, other.extent) {
            (Extent::Sectors, _) | (_, Extent::Sectors) => true,
            (one, two) => one == Extent::Range && two == Extent::Range,
        };
        meet && (self.write || other.write) && !(self.strong && other.strong)
    }

    /// Whether whatever conflicts with `other`, which comes before this, conflicts with this too.
    fn stands_for(&self, other: &Access) -> bool {
        self.write >= other.write && self.strong <= other.strong && self.extent >= other.extent
    }
}

impl Cell {
    /// Adds an access; returns an earlier one that conflicts and of which `known` says that it does not come before.
    fn add(&mut self, new: &Access, known: &impl Fn(&Access) -> bool) -> Option<Access> {
        let found = self.accesses.iter().find(|old| !known(old) && new.conflicts(old)).cloned();
        self.accesses.retain(|old| !(known(old) && new.stands_for(old)));
        self.accesses.push(new.clone());
        found
    }
}

impl History {
    /// Makes a cell end where `at` is inside one.
    fn cut(&mut self, at: u64) {
        if let Some((&first, cell)) = self.cells.range_mut(..at).next_back()
            && cell.end > at
            && first < at
        {
            let rest = Cell { end: cell.end, accesses: cell.accesses.clone() };
            cell.end = at;
            self.cells.insert(at, rest);
        }
    }

    /// Adds an access to a range. Returns the first conflict: its address, and the other access.
    fn add(&mut self, first: u64, end: u64, new: &Access, known: &impl Fn(&Access) -> bool) -> Option<(u64, Access)> {
        // Most ranges are accessed again and again.
        if let Some(cell) = self.cells.get_mut(&first).filter(|cell| cell.end == end) {
            return cell.add(new, known).map(|other| (first, other));
        }
        self.cut(first);
        self.cut(end);
        let starts: Vec<u64> = self.cells.range(first..end).map(|(&start, _)| start).collect();
        let mut found = None;
        let mut pieces: Vec<(u64, Cell)> = Vec::new();
        // What follows the last piece and is like it becomes part of it.
        let mut push = |start: u64, cell: Cell| match pieces.last_mut() {
            Some((_, last)) if last.end == start && last.accesses == cell.accesses => last.end = cell.end,
            _ => pieces.push((start, cell)),
        };
        let mut at = first;
        for start in starts {
            let Some(mut cell) = self.cells.remove(&start) else { continue };
            if at < start {
                push(at, Cell { end: start, accesses: vec![new.clone()] });
            }
            let other = cell.add(new, known);
            found = found.or(other.map(|other| (start, other)));
            at = cell.end;
            push(start, cell);
        }
        if at < end {
            push(at, Cell { end, accesses: vec![new.clone()] });
        }
        self.cells.extend(pieces);
        found
    }
}

impl Order {
    /// What comes before the stream's next item.
    fn before(&self, stream: &Stream) -> Clock {
        let mut clock = self.host.clone();
        for (&handle, other) in &self.streams {
            let waits = match (stream.role, other.role) {
                (Role::NonBlocking, _) | (_, Role::NonBlocking) => false,
                (Role::Legacy, _) | (_, Role::Legacy) => other.context == stream.context,
                _ => false,
            };
            if waits || handle == stream.handle {
                join(&mut clock, &other.clock);
            }
        }
        clock
    }

    fn learn(&mut self, stream: &Stream, clock: &Clock) {
        let own = Known { context: stream.context, role: stream.role, clock: Clock::new() };
        join(&mut self.streams.entry(stream.handle).or_insert(own).clock, clock);
    }

    fn name(&self, stream: usize) -> String {
        match self.streams.get(&stream).map(|known| known.role) {
            Some(Role::Legacy) => "the legacy stream".into(),
            Some(Role::PerThread) => format!("a thread's default stream ({stream:#x})"),
            Some(Role::NonBlocking) => format!("non-blocking stream {stream:#x}"),
            Some(Role::Blocking) | None => format!("stream {stream:#x}"),
        }
    }

    /// Adds what the current item of a stream has accessed; an error is the sentence about the first conflict.
    fn access(&mut self, stream: &Stream, what: &Arc<str>, exact: bool, spans: &[Span]) -> Answer<Result<(), String>> {
        let devices = &driver()?.devices;
        let Order { streams, histories, .. } = self;
        let Some(Known { clock, .. }) = streams.get(&stream.handle) else { return Ok(Ok(())) };
        let time = clock.get(&stream.handle).copied().unwrap_or_default();
        let known = |other: &Access| {
            clock.get(&other.stream).is_some_and(|&time| time >= other.time) || !streams.contains_key(&other.stream)
        };
        let mut conflict = None;
        for span in spans {
            let Some(device) = devices.iter().find(|device| device.memory.owns(span.first)) else { continue };
            let Some(allocation) = device.memory.find(span.first) else { continue };
            let limit = allocation.address + allocation.bytes;
            let history = histories.entry(allocation.address).or_default();
            if history.serial != allocation.serial {
                *history = History { serial: allocation.serial, cells: BTreeMap::new() };
            }
            let end = span.end.min(limit);
            // The sectors that are whole: the last one of an allocation has no bytes behind it.
            let (from, upto) = match exact {
                true if end == limit => (span.first.next_multiple_of(SECTOR).min(end), end),
                true => (span.first.next_multiple_of(SECTOR).min(end), end / SECTOR * SECTOR),
                false => (span.first, end),
            };
            let inner = if exact || span.whole { Extent::Sectors } else { Extent::Some };
            let parts = match from < upto {
                true => [(span.first, from, Extent::Range), (from, upto, inner), (upto, end, Extent::Range)],
                false => [(span.first, end, Extent::Range), (end, end, inner), (end, end, Extent::Range)],
            };
            for (first, end, extent) in parts.into_iter().filter(|(first, end, _)| first < end) {
                let (what, write, strong) = (what.clone(), span.write, span.strong);
                let new = Access { what, stream: stream.handle, time, write, strong, extent };
                if let Some((at, other)) = history.add(first, end, &new, &known) {
                    conflict.get_or_insert((write, at, allocation, other));
                }
            }
        }
        let Some((write, at, allocation, other)) = conflict else { return Ok(Ok(())) };
        Ok(Err(format!(
            "{what} on {} {} global memory at {at:#x} (byte {} of allocation {}, which has {}), which {} on {} has {}, \
             and nothing orders the two: no event, no synchronisation, no rule of the legacy stream",
            self.name(stream.handle),
            if write { "writes" } else { "reads" },
            at - allocation.address,
            allocation.serial,
            allocation.bytes,
            other.what,
            self.name(other.stream),
            if other.write { "written" } else { "read" },
        )))
    }
}

fn lock() -> Answer<MutexGuard<'static, Order>> {
    Ok(driver()?.order.lock().unwrap_or_else(PoisonError::into_inner))
}

/// The stream begins its next item.
pub fn begin(stream: &Stream) -> Answer {
    let mut order = lock()?;
    let mut clock = order.before(stream);
    *clock.entry(stream.handle).or_default() += 1;
    order.learn(stream, &clock);
    Ok(())
}

/// What an event recorded now on the stream stands for.
pub fn now(stream: &Stream) -> Answer<Clock> {
    Ok(lock()?.before(stream))
}

/// The stream's next item comes after what `clock` says.
pub fn wait(stream: &Stream, clock: &Clock) -> Answer {
    lock()?.learn(stream, clock);
    Ok(())
}

/// The host has waited for a stream.
pub fn host_waited(stream: &Stream) -> Answer {
    let mut order = lock()?;
    order.host = order.before(stream);
    Ok(())
}

/// The host has waited for what an event stands for.
pub fn host_waited_for(clock: &Clock) -> Answer {
    join(&mut lock()?.host, clock);
    Ok(())
}

/// The host has waited for all work of a context.
pub fn host_waited_for_all(context: &Context) -> Answer {
    let Order { host, streams, .. } = &mut *lock()?;
    streams.values().filter(|known| known.context == context.handle).for_each(|known| join(host, &known.clock));
    Ok(())
}

/// A stream is destroyed. Its work goes on: it is forgotten only if the host knows all of it.
pub fn forget_stream(stream: &Stream) -> Answer {
    let Order { host, streams, .. } = &mut *lock()?;
    let Some(Known { clock, .. }) = streams.get(&stream.handle) else { return Ok(()) };
    if host.get(&stream.handle) == clock.get(&stream.handle) {
        streams.remove(&stream.handle);
        host.remove(&stream.handle);
        streams.values_mut().for_each(|known| _ = known.clock.remove(&stream.handle));
    }
    Ok(())
}

/// A context is destroyed, and with it its streams.
pub fn forget_context(context: usize) -> Answer {
    lock()?.streams.retain(|_, known| known.context != context);
    Ok(())
}

/// An allocation is freed.
pub fn forget_memory(address: u64) -> Answer {
    lock()?.histories.remove(&address);
    Ok(())
}

/// Checks and adds what the current item of a stream has accessed: exactly these bytes, or sectors as a kernel notes
/// them.
pub fn access(context: &Context, stream: &Stream, run: &Run, what: &str, exact: bool, spans: &[Span]) -> Answer {
    if !run.stream_order || spans.is_empty() {
        return Ok(());
    }
    let checked = lock()?.access(stream, &what.into(), exact, spans)?;
    let Err(message) = checked else { return Ok(()) };
    driver()?.profile.lock().unwrap().faults.push(message.clone());
    context.fail(Refusal { code: Code::LAUNCH_FAILED, message })
}
