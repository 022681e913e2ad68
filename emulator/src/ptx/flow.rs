//! From bodies on virtual registers to a kernel's program: inlines calls, orders basic blocks, allocates registers.
//!
//! **Reconvergence.** The interpreter always runs the group of lanes with the smallest step, and merges groups that
//! meet. This reconverges at the immediate post-dominator of every branch if, back edges aside, each block comes after
//! all blocks that reach it, and the blocks of a loop are contiguous: lanes that have left a loop then wait behind it
//! for the last one. [`order`] computes such an order, and keeps the order of the text where it has a choice.
//!
//! **Registers.** Lanes write only their own lane of a register, so a register may be reused as soon as it is dead in
//! the control flow of one thread, however lanes diverge.
//!
//! **Calls through addresses.** Such a call becomes a jump by the address to the code of each function that it may
//! reach: those of its signature whose address the module takes, or those of its `.calltargets`. All of them return to
//! the step behind the call, where the lanes meet again. One shared copy of each function would be shorter, but it
//! would stand before or behind all of its callers, and lanes that return from different functions would not meet.
//!
//! Recursion is refused, since inlined calls need no stack: that of direct calls here, through an address when it
//! happens.

use super::decode::{Body, BodyConstant, BodyOp, CONSTANT, Ins, MAX_LOCAL_BYTES, Prototype, Value};
use super::parse::{Entry, SharedVariable, Unit};
use super::program::*;
use super::{Kernel, ParseError};
use crate::num::{Class, FlopType};
use std::cmp::Reverse;
use std::collections::{BinaryHeap, HashMap};
use std::sync::Arc;

/// Maximum depth of inlined calls.
const MAX_CALL_DEPTH: usize = 64;
/// Maximum number of instructions of a kernel with all calls inlined.
const MAX_INSTRUCTIONS: usize = 1 << 22;
/// How deep calls through addresses may be nested, with the maximum number of instructions for that: the code may grow
/// by a factor with every level, so the first that fits is taken.
const NESTING: [(usize, usize); 4] = [(16, 1 << 16), (4, 1 << 16), (2, 1 << 16), (1, MAX_INSTRUCTIONS)];

/// An instruction after inlining: registers are the kernel's, labels too.
#[derive(Clone, Copy)]
struct Flat {
    op: FlatOp,
    guard: Option<(Value, bool)>,
    first: u32,
    outputs: u8,
    arity: u8,
    source: Source,
}

#[derive(Clone, Copy)]
enum FlatOp {
    Op(Op),
    Label(u32),
    Goto(u32),
    Table(u32),
    Call(u32),
}

#[derive(Default)]
struct Code {
    ins: Vec<Flat>,
    pool: Vec<Value>,
    bits: Vec<u8>,
    constants: Vec<Constant>,
    interned: HashMap<Constant, u32>,
    tables: Vec<Vec<u32>>,
    /// Calls through addresses; their targets are labels.
    calls: Vec<CallSite>,
    labels: u32,
    local: u64,
    shared: Vec<u32>,
    /// How many calls through addresses are being inlined, one inside the other.
    nested: usize,
    /// Limits of `nested` and of the number of instructions.
    limits: (usize, usize),
    /// The latter has been exceeded.
    too_long: bool,
}

/// Builds the kernel.
pub fn kernel(entry: &Entry, unit: &Unit, functions: &Arc<[Callee]>, text: &Arc<str>) -> Result<Kernel, ParseError> {
    let code = inlined(entry, unit)?;
    let (offsets, static_shared) = place_shared(&code.shared, &unit.shared, entry.line)?;
    let mut kernel = Kernel {
        name: entry.kernel.name.clone(),
        params: entry.kernel.params.clone(),
        static_shared,
        local_bytes: code.local.next_multiple_of(8) as u32,
        const_bytes: unit
            .globals
            .iter()
            .filter(|g| g.space == super::GlobalSpace::Const)
            .map(|g| g.bytes)
            .sum::<u64>()
            .min(u64::from(u32::MAX)) as u32,
        param_bytes: entry.kernel.param_bytes,
        max_threads: entry.kernel.max_threads,
        required_threads: entry.kernel.required_threads,
        min_blocks: entry.kernel.min_blocks,
        registers: 0,
        program: Program::default(),
    };
    let blocks = split(&code);
    let order = order(&blocks);
    let program = emit(&code, &blocks, &order, &mut kernel.registers);
    kernel.program = Program { shared: offsets, functions: functions.clone(), text: text.clone(), ..program };
    Ok(kernel)
}

/// The kernel's code with all calls in line.
fn inlined(entry: &Entry, unit: &Unit) -> Result<Code, ParseError> {
    let bodies = unit.functions.iter().filter_map(|function| function.body.as_ref());
    let by_address = bodies.chain([&entry.body]).any(|body| !body.prototypes.is_empty());
    let mut limits = NESTING.into_iter().skip(if by_address { 0 } else { NESTING.len() - 1 });
    loop {
        let (limits, last) = (limits.next().expect("the last try returns"), limits.len() == 0);
        let mut code = Code { limits, ..Code::default() };
        match code.inline(&entry.body, &[], 0, None, unit, &mut vec![]) {
            Ok(()) => return Ok(code),
            Err(_) if code.too_long && !last => {}
            Err(why) => return Err(why),
        }
    }
}

/// Offsets of all of the module's shared variables (0 for unused ones), and the static size.
fn place_shared(used: &[u32], variables: &[SharedVariable], line: u32) -> Result<(Vec<u32>, u32), ParseError> {
    let mut offsets = vec![0; variables.len()];
    let mut end = 0u64;
    for &index in used.iter().filter(|&&index| !variables[index as usize].dynamic) {
        let variable = &variables[index as usize];
        let at = end.next_multiple_of(variable.align);
        end = at + variable.bytes;
        if end > 1 << 24 {
            return Err(ParseError::invalid(line, format!("{end} bytes of shared memory")));
        }
        offsets[index as usize] = at as u32;
    }
    for &index in used.iter().filter(|&&index| variables[index as usize].dynamic) {
        end = end.next_multiple_of(variables[index as usize].align);
    }
    for &index in used.iter().filter(|&&index| variables[index as usize].dynamic) {
        offsets[index as usize] = end as u32;
    }
    Ok((offsets, end as u32))
}

impl Code {
    fn constant(&mut self, constant: Constant) -> Value {
        let next = self.constants.len() as u32;
        let index = *self.interned.entry(constant).or_insert(next);
        if index == next {
            self.constants.push(constant);
        }
        index | CONSTANT
    }

    fn push(&mut self, op: FlatOp, guard: Option<(Value, bool)>, source: Source) {
        let first = self.pool.len() as u32;
        self.ins.push(Flat { op, guard, first, outputs: 0, arity: 0, source });
    }

    fn label(&mut self) -> u32 {
        self.labels += 1;
        self.labels - 1
    }

    /// Labels of the code of all functions that the call through an address at `index` may reach.
    fn callees(&self, index: u32) -> Vec<u32> {
        let FlatOp::Call(call) = self.ins[index as usize].op else { unreachable!("the end says call") };
        self.calls[call as usize].targets.iter().filter_map(|(_, code)| code.as_ref().ok().copied()).collect()
    }

    /// Appends a body whose formal parameters are at `actuals` in local memory and whose frame begins at `frame`.
    /// Returns jump to `end`.
    fn inline(
        &mut self,
        body: &Body,
        actuals: &[u64],
        frame: u64,
        end: Option<u32>,
        unit: &Unit,
        stack: &mut Vec<u32>,
    ) -> Result<(), ParseError> {
        let register_base = self.bits.len() as u32;
        self.bits.extend_from_slice(&body.bits);
        let label_base = self.labels;
        self.labels += body.labels;
        let table_base = self.tables.len() as u32;
        self.tables.extend(body.tables.iter().map(|table| table.iter().map(|label| label + label_base).collect()));
        for &index in &body.shared {
            if !self.shared.contains(&index) {
                self.shared.push(index);
            }
        }
        let frame = frame.next_multiple_of(16);
        self.local = self.local.max(frame + body.frame);
        let first_line = body.ins.first().map_or(0, |ins| ins.source.line);
        if self.local > MAX_LOCAL_BYTES {
            return Err(ParseError::invalid(first_line, format!("more than {MAX_LOCAL_BYTES} bytes of local memory")));
        }
        let constants: Vec<Value> = body
            .constants
            .iter()
            .map(|&constant| {
                self.constant(match constant {
                    BodyConstant::Plain(constant) => constant,
                    BodyConstant::Frame(offset, wide) => Constant::Local(frame.wrapping_add(offset), wide),
                    BodyConstant::Formal(index, addend, wide) => {
                        Constant::Local(actuals[index as usize].wrapping_add(addend as u64), wide)
                    }
                })
            })
            .collect();
        let map = |value: Value| match value & CONSTANT {
            0 => value + register_base,
            _ => constants[(value & !CONSTANT) as usize],
        };
        for ins in &body.ins {
            if self.ins.len() > self.limits.1 {
                self.too_long = true;
                let message = format!("more than {} instructions with all calls in line", self.limits.1);
                return Err(ParseError::invalid(ins.source.line, message));
            }
            let guard = ins.guard.map(|(register, negate)| (map(register), negate));
            let operands = &body.pool[ins.first as usize..][..ins.arity as usize];
            let first = self.pool.len() as u32;
            self.pool.extend(operands.iter().map(|&value| map(value)));
            let op = match ins.op {
                BodyOp::Op(op) => FlatOp::Op(op),
                BodyOp::Label(label) => FlatOp::Label(label + label_base),
                BodyOp::Goto(label) => FlatOp::Goto(label + label_base),
                BodyOp::Table(table) => FlatOp::Table(table + table_base),
                BodyOp::Return => match end {
                    Some(end) => FlatOp::Goto(end),
                    None => FlatOp::Op(Op::Exit { fall: 0 }),
                },
                BodyOp::Call(index) => {
                    let function = &unit.functions[index as usize];
                    let fail = |message: String| Err(ParseError::invalid(ins.source.line, message));
                    let op = match (&function.body, function.name.as_str()) {
                        (None, "vprintf") if ins.arity == 3 => Some(Op::Printf),
                        (None, "__assertfail") if ins.arity == 5 => Some(Op::AssertFail),
                        (None, name) => {
                            return fail(format!("call of {name}, which this module only declares, is not supported"));
                        }
                        (Some(_), _) => None,
                    };
                    if let Some(op) = op {
                        self.ins.push(Flat {
                            op: FlatOp::Op(op),
                            guard,
                            first,
                            outputs: 0,
                            arity: ins.arity,
                            source: ins.source,
                        });
                        continue;
                    }
                    if stack.contains(&index) {
                        return fail(format!("{} calls itself, which is not supported", function.name));
                    }
                    if stack.len() >= MAX_CALL_DEPTH {
                        return fail(format!("calls more than {MAX_CALL_DEPTH} deep"));
                    }
                    let given = self.places(&self.pool[first as usize..]);
                    let after = self.label();
                    if let Some((register, negate)) = guard {
                        self.push(FlatOp::Goto(after), Some((register, !negate)), ins.source);
                    }
                    stack.push(index);
                    if let Some(callee) = &function.body {
                        self.inline(callee, &given, frame + body.frame, Some(after), unit, stack)?;
                    }
                    stack.pop();
                    self.push(FlatOp::Label(after), None, ins.source);
                    continue;
                }
                BodyOp::CallAddress(prototype) => {
                    let prototype = &body.prototypes[prototype as usize];
                    self.call_address(prototype, ins, guard, first, frame + body.frame, unit, stack)?;
                    continue;
                }
            };
            self.ins.push(Flat { op, guard, first, outputs: ins.outputs, arity: ins.arity, source: ins.source });
        }
        Ok(())
    }

    /// Offsets in local memory of a call's parameters.
    fn places(&self, parameters: &[Value]) -> Vec<u64> {
        let place = |&value: &Value| match self.constants[(value & !CONSTANT) as usize] {
            Constant::Local(offset, _) => offset,
            other => unreachable!("parameter of a call at {other:?}, the decoder only makes local ones"),
        };
        parameters.iter().map(place).collect()
    }

    /// Appends a call through an address. Its operands, from `first` on in the pool, are the parameters, then the
    /// address.
    #[allow(clippy::too_many_arguments)]
    fn call_address(
        &mut self,
        prototype: &Prototype,
        ins: &Ins,
        guard: Option<(Value, bool)>,
        first: u32,
        frame: u64,
        unit: &Unit,
        stack: &mut Vec<u32>,
    ) -> Result<(), ParseError> {
        let address = first + u32::from(ins.arity) - 1;
        let given = self.places(&self.pool[first as usize..address as usize]);
        let after = self.label();
        if let Some((register, negate)) = guard {
            self.push(FlatOp::Goto(after), Some((register, !negate)), ins.source);
        }
        let call = self.calls.len();
        let Prototype { signature, targets } = prototype;
        self.calls.push(CallSite { signature: signature.clone(), listed: targets.is_some(), targets: vec![] });
        let op = FlatOp::Call(call as u32);
        self.ins.push(Flat { op, guard: None, first: address, outputs: 0, arity: 1, source: ins.source });
        self.nested += 1;
        for &index in targets.as_ref().unwrap_or(&unit.taken) {
            if unit.functions[index as usize].signature() == *signature {
                let code = self.target(index, &given, frame, after, ins.source, unit, stack)?;
                self.calls[call].targets.push((index, code));
            }
        }
        self.nested -= 1;
        self.push(FlatOp::Label(after), None, ins.source);
        Ok(())
    }

    /// Appends the code of a function that a call through an address may reach; returns its label. Or why it cannot be
    /// called, which is no error before someone does: tables of virtual functions hold destructors that nobody uses.
    #[allow(clippy::too_many_arguments)]
    fn target(
        &mut self,
        index: u32,
        given: &[u64],
        frame: u64,
        after: u32,
        source: Source,
        unit: &Unit,
        stack: &mut Vec<u32>,
    ) -> Result<Result<u32, String>, ParseError> {
        let function = &unit.functions[index as usize];
        let name = &function.name;
        let Some(body) = &function.body else {
            return Ok(Err(format!("{name}, which this module only declares")));
        };
        if stack.contains(&index) {
            return Ok(Err(format!("{name} from within {name}, and recursion is not supported")));
        }
        let most = self.limits.0;
        if self.nested > most {
            let message =
                format!("{name}, nested deeper than the {most} calls by address that this kernel has room for");
            return Ok(Err(message));
        }
        let (ins, calls, shared, depth) = (self.ins.len(), self.calls.len(), self.shared.len(), stack.len());
        let (local, nested) = (self.local, self.nested);
        let label = self.label();
        self.push(FlatOp::Label(label), None, source);
        stack.push(index);
        let done = self.inline(body, given, frame, Some(after), unit, stack);
        stack.truncate(depth);
        match done {
            Ok(()) => Ok(Ok(label)),
            Err(why) if self.too_long => Err(why),
            Err(why) => {
                self.ins.truncate(ins);
                self.calls.truncate(calls);
                self.shared.truncate(shared);
                (self.local, self.nested) = (local, nested);
                Ok(Err(format!("{name}, which cannot run here: {} (PTX line {})", why.message, why.line)))
            }
        }
    }
}

/// A basic block: a range of the flat code without labels, and where control goes.
#[derive(Default)]
struct Block {
    ins: Vec<u32>,
    end: End,
    next: Vec<u32>,
}

/// How a block ends. Successor 0 is the target, the last one is the fall-through.
#[derive(Clone, Copy, Default, PartialEq)]
enum End {
    /// Falls through to `next[0]`.
    #[default]
    Fall,
    /// Jumps to `next[0]`.
    Goto(u32),
    /// Conditional, by the guard of the instruction.
    Branch(u32),
    /// Indexed: the whole table, then perhaps the fall-through.
    Table(u32),
    /// By a function's address: the code of every function that has some.
    Call(u32),
    /// Exit; with a guard it may fall through.
    Exit(u32),
}

/// Operations at which lanes wait for each other begin a block, so that a waiting group has booked what it ran.
fn waits(op: &Op) -> bool {
    matches!(
        op,
        Op::Barrier { .. } | Op::WarpSync | Op::Shuffle { .. } | Op::Vote { .. } | Op::Match { .. } | Op::Redux(_)
    )
}

fn split(code: &Code) -> Vec<Block> {
    let mut blocks = vec![Block::default()];
    let mut label_block = vec![0u32; code.labels as usize];
    let mut open = true;
    for (i, ins) in code.ins.iter().enumerate() {
        let leader = match &ins.op {
            FlatOp::Label(_) => true,
            FlatOp::Op(op) => waits(op),
            _ => false,
        };
        let empty = blocks.last().is_some_and(|block| block.ins.is_empty());
        if !open || (leader && !empty) {
            blocks.push(Block::default());
            open = true;
        }
        let at = blocks.len() - 1;
        let index = i as u32;
        match ins.op {
            FlatOp::Label(label) => {
                label_block[label as usize] = at as u32;
                continue;
            }
            FlatOp::Op(Op::Exit { .. }) => blocks[at].end = End::Exit(index),
            FlatOp::Op(_) => {
                blocks[at].ins.push(index);
                continue;
            }
            FlatOp::Goto(_) if ins.guard.is_none() => blocks[at].end = End::Goto(index),
            FlatOp::Goto(_) => blocks[at].end = End::Branch(index),
            FlatOp::Table(_) => blocks[at].end = End::Table(index),
            FlatOp::Call(_) => blocks[at].end = End::Call(index),
        }
        open = false;
    }
    let count = blocks.len() as u32;
    for (i, block) in blocks.iter_mut().enumerate() {
        let follow = (i as u32 + 1).min(count - 1);
        let target = |index: u32| match code.ins[index as usize].op {
            FlatOp::Goto(label) => label_block[label as usize],
            _ => unreachable!("only a goto has one target"),
        };
        block.next = match block.end {
            End::Fall => vec![follow],
            End::Goto(index) => vec![target(index)],
            End::Branch(index) => vec![target(index), follow],
            End::Table(index) => {
                let FlatOp::Table(table) = code.ins[index as usize].op else { unreachable!("the end says table") };
                let mut next: Vec<u32> =
                    code.tables[table as usize].iter().map(|&label| label_block[label as usize]).collect();
                if code.ins[index as usize].guard.is_some() {
                    next.push(follow);
                }
                next
            }
            End::Call(index) => code.callees(index).iter().map(|&label| label_block[label as usize]).collect(),
            End::Exit(index) if code.ins[index as usize].guard.is_some() => vec![follow],
            End::Exit(_) => vec![],
        };
    }
    blocks
}

/// Reachable blocks in reverse post-order, and each block's place there (u32::MAX where unreachable).
fn reverse_post_order(blocks: &[Block]) -> (Vec<u32>, Vec<u32>) {
    let mut seen = vec![false; blocks.len()];
    let mut post = vec![];
    let mut stack = vec![(0u32, 0usize)];
    seen[0] = true;
    while let Some((block, edge)) = stack.last_mut() {
        match blocks[*block as usize].next.get(*edge) {
            Some(&next) => {
                *edge += 1;
                if !seen[next as usize] {
                    seen[next as usize] = true;
                    stack.push((next, 0));
                }
            }
            None => {
                post.push(*block);
                stack.pop();
            }
        }
    }
    post.reverse();
    let mut place = vec![u32::MAX; blocks.len()];
    for (i, &block) in post.iter().enumerate() {
        place[block as usize] = i as u32;
    }
    (post, place)
}

/// Immediate dominators as places in `rpo` (Cooper, Harvey, Kennedy: A Simple, Fast Dominance Algorithm).
fn dominators(rpo: &[u32], predecessors: &[Vec<u32>]) -> Vec<u32> {
    let mut idom = vec![u32::MAX; rpo.len()];
    idom[0] = 0;
    let mut changed = true;
    while changed {
        changed = false;
        for at in 1..rpo.len() {
            let mut new = u32::MAX;
            for &p in &predecessors[at] {
                if idom[p as usize] == u32::MAX {
                    continue;
                }
                new = if new == u32::MAX { p } else { meet(&idom, new, p) };
            }
            if idom[at] != new {
                idom[at] = new;
                changed = true;
            }
        }
    }
    idom
}

fn meet(idom: &[u32], mut a: u32, mut b: u32) -> u32 {
    while a != b {
        while a > b {
            a = idom[a as usize];
        }
        while b > a {
            b = idom[b as usize];
        }
    }
    a
}

/// The order of blocks; see the module's documentation.
fn order(blocks: &[Block]) -> Vec<u32> {
    const ROOT: usize = usize::MAX;
    let (rpo, place) = reverse_post_order(blocks);
    let n = rpo.len();
    let mut predecessors = vec![vec![]; n];
    for (at, &block) in rpo.iter().enumerate() {
        for &next in &blocks[block as usize].next {
            predecessors[place[next as usize] as usize].push(at as u32);
        }
    }
    let idom = dominators(&rpo, &predecessors);
    // Depth in the dominator tree with entry intervals, so that "h dominates u" is two comparisons.
    let mut children = vec![vec![]; n];
    for at in 1..n {
        children[idom[at] as usize].push(at);
    }
    let (mut enter, mut leave, mut clock) = (vec![0u32; n], vec![0u32; n], 0);
    let mut stack = vec![(0usize, 0usize)];
    while let Some((at, child)) = stack.last_mut() {
        if *child == 0 {
            clock += 1;
            enter[*at] = clock;
        }
        match children[*at].get(*child) {
            Some(&next) => {
                *child += 1;
                stack.push((next, 0));
            }
            None => {
                leave[*at] = clock;
                stack.pop();
            }
        }
    }
    let dominates = |h: usize, u: usize| enter[h] <= enter[u] && leave[u] <= leave[h];
    // The innermost loop of each block, by its header: outer headers come first in reverse post-order.
    let mut innermost = vec![ROOT; n];
    let mut parent = vec![ROOT; n];
    let mut header = vec![false; n];
    for h in 0..n {
        let mut work: Vec<usize> = predecessors[h].iter().map(|&u| u as usize).filter(|&u| dominates(h, u)).collect();
        if work.is_empty() {
            continue;
        }
        header[h] = true;
        parent[h] = innermost[h];
        innermost[h] = h;
        while let Some(u) = work.pop() {
            if innermost[u] == h {
                continue;
            }
            innermost[u] = h;
            work.extend(predecessors[u].iter().map(|&p| p as usize));
        }
    }
    // Kahn's algorithm without edges that go back, staying inside a loop while it has ready blocks.
    let mut waiting = vec![0u32; n];
    for at in 0..n {
        waiting[at] = predecessors[at].iter().filter(|&&p| (p as usize) < at).count() as u32;
    }
    let mut ready: HashMap<usize, BinaryHeap<Reverse<(u32, usize)>>> = HashMap::new();
    let home = |at: usize| {
        if header[at] { parent[at] } else { innermost[at] }
    };
    ready.entry(home(0)).or_default().push(Reverse((rpo[0], 0)));
    let mut done = vec![false; n];
    let mut result = Vec::with_capacity(n);
    let mut current = ROOT;
    loop {
        let Some(Reverse((block, at))) = ready.get_mut(&current).and_then(|heap| heap.pop()) else {
            if current == ROOT {
                break;
            }
            current = parent[current];
            continue;
        };
        done[at] = true;
        result.push(block);
        if header[at] {
            current = at;
        }
        for &next in &blocks[block as usize].next {
            let to = place[next as usize] as usize;
            if to > at {
                waiting[to] -= 1;
                if waiting[to] == 0 {
                    ready.entry(home(to)).or_default().push(Reverse((rpo[to], to)));
                }
            }
        }
    }
    // Only irreducible control flow leaves blocks over.
    result.extend((0..n).filter(|&at| !done[at]).map(|at| rpo[at]));
    result
}

fn reads(code: &Code, ins: &Flat, mut visit: impl FnMut(Value)) {
    if let Some((register, _)) = ins.guard {
        visit(register);
        // A guarded instruction may not write, so its destination stays live.
        for &value in &code.pool[ins.first as usize..][..ins.outputs as usize] {
            visit(value);
        }
    }
    for &value in &code.pool[ins.first as usize + ins.outputs as usize..][..(ins.arity - ins.outputs) as usize] {
        if value & CONSTANT == 0 {
            visit(value);
        }
    }
}

/// The instructions of a block with its end.
fn block_ins(block: &Block) -> impl Iterator<Item = u32> + '_ {
    let last = match block.end {
        End::Fall => None,
        End::Goto(i) | End::Branch(i) | End::Table(i) | End::Call(i) | End::Exit(i) => Some(i),
    };
    block.ins.iter().copied().chain(last)
}

/// Live range of each register as positions: instruction i reads at 2i and writes at 2i + 1. `u32::MAX, 0` if never
/// touched.
fn live_ranges(code: &Code, blocks: &[Block], order: &[u32]) -> Vec<(u32, u32)> {
    let registers = code.bits.len();
    let mut ranges = vec![(u32::MAX, 0u32); registers];
    // Registers used in one block only, written before they are read, need no data flow analysis.
    let mut home = vec![u32::MAX; registers];
    let mut global = vec![u32::MAX; registers];
    let mut globals = 0u32;
    let mut make_global = |register: usize, global: &mut Vec<u32>| {
        if global[register] == u32::MAX {
            global[register] = globals;
            globals += 1;
        }
    };
    for (at, &block) in order.iter().enumerate() {
        for index in block_ins(&blocks[block as usize]) {
            let ins = &code.ins[index as usize];
            reads(code, ins, |register| {
                if home[register as usize] != at as u32 {
                    make_global(register as usize, &mut global);
                }
            });
            for &register in &code.pool[ins.first as usize..][..ins.outputs as usize] {
                let register = register as usize;
                if home[register] == u32::MAX {
                    home[register] = at as u32;
                } else if home[register] != at as u32 {
                    make_global(register, &mut global);
                }
            }
        }
    }
    let words = (globals as usize).div_ceil(64);
    let n = order.len();
    let mut place = vec![u32::MAX; blocks.len()];
    for (at, &block) in order.iter().enumerate() {
        place[block as usize] = at as u32;
    }
    let (mut used, mut killed) = (vec![0u64; n * words], vec![0u64; n * words]);
    for (at, &block) in order.iter().enumerate() {
        let (used, killed) = (&mut used[at * words..][..words], &mut killed[at * words..][..words]);
        for index in block_ins(&blocks[block as usize]) {
            let ins = &code.ins[index as usize];
            reads(code, ins, |register| {
                let bit = global[register as usize];
                if bit != u32::MAX && killed[bit as usize / 64] >> (bit % 64) & 1 == 0 {
                    used[bit as usize / 64] |= 1 << (bit % 64);
                }
            });
            for &register in &code.pool[ins.first as usize..][..ins.outputs as usize] {
                let bit = global[register as usize];
                if bit != u32::MAX {
                    killed[bit as usize / 64] |= 1 << (bit % 64);
                }
            }
        }
    }
    let mut live_in = used.clone();
    let mut live_out = vec![0u64; n * words];
    let mut changed = true;
    while changed {
        changed = false;
        for at in (0..n).rev() {
            for &next in &blocks[order[at] as usize].next {
                let next = place[next as usize] as usize;
                for w in 0..words {
                    live_out[at * words + w] |= live_in[next * words + w];
                }
            }
            for w in 0..words {
                let i = at * words + w;
                let new = used[i] | (live_out[i] & !killed[i]);
                changed |= new != live_in[i];
                live_in[i] = new;
            }
        }
    }
    let mut of_bit = vec![0u32; globals as usize];
    for (register, &bit) in global.iter().enumerate() {
        if bit != u32::MAX {
            of_bit[bit as usize] = register as u32;
        }
    }
    let mut touch = |register: u32, position: u32| {
        let range = &mut ranges[register as usize];
        *range = (range.0.min(position), range.1.max(position));
    };
    let mut position = 0u32;
    for (at, &block) in order.iter().enumerate() {
        let start = position;
        for index in block_ins(&blocks[block as usize]) {
            let ins = &code.ins[index as usize];
            // With several results a source must outlive the first write.
            let several = u32::from(ins.outputs > 1);
            reads(code, ins, |register| touch(register, position + several));
            for &register in &code.pool[ins.first as usize..][..ins.outputs as usize] {
                touch(register, position + 1);
            }
            position += 2;
        }
        // An empty block gets a position of its own, so that what is live through it has one too.
        position += 2;
        for w in 0..words {
            for (bits, edge) in [(live_in[at * words + w], start), (live_out[at * words + w], position - 1)] {
                let mut rest = bits;
                while rest != 0 {
                    touch(of_bit[w * 64 + rest.trailing_zeros() as usize], edge);
                    rest &= rest - 1;
                }
            }
        }
    }
    ranges
}

/// Byte offset of every register, bytes used, and the peak number of 32-bit registers.
fn allocate(code: &Code, ranges: &[(u32, u32)]) -> (Vec<u32>, u32, u32) {
    #[derive(Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
    enum Pool {
        Pred,
        Single,
        Double,
    }
    let pool = |bits: u8| match bits {
        1 => Pool::Pred,
        64 => Pool::Double,
        _ => Pool::Single,
    };
    let mut by_start: Vec<u32> = (0..ranges.len() as u32).filter(|&r| ranges[r as usize].0 != u32::MAX).collect();
    by_start.sort_by_key(|&r| ranges[r as usize].0);
    let mut slot = vec![0u32; ranges.len()];
    let mut free: [BinaryHeap<Reverse<u32>>; 3] = Default::default();
    let mut count = [0u32; 3];
    let mut active: BinaryHeap<Reverse<(u32, u32)>> = BinaryHeap::new();
    for register in by_start {
        let (start, end) = ranges[register as usize];
        while let Some(&Reverse((ended, old))) = active.peek()
            && ended < start
        {
            active.pop();
            free[pool(code.bits[old as usize]) as usize].push(Reverse(slot[old as usize]));
        }
        let pool = pool(code.bits[register as usize]) as usize;
        slot[register as usize] = match free[pool].pop() {
            Some(Reverse(slot)) => slot,
            None => {
                count[pool] += 1;
                count[pool] - 1
            }
        };
        active.push(Reverse((end, register)));
    }
    let singles = (count[0] * 4).next_multiple_of(64);
    let doubles = singles + count[1] * 128;
    let offsets = (0..ranges.len())
        .map(|register| match pool(code.bits[register]) {
            Pool::Pred => slot[register] * 4,
            Pool::Single => singles + slot[register] * 128,
            Pool::Double => doubles + slot[register] * 256,
        })
        .collect();
    (offsets, doubles + count[2] * 256, count[1] + 2 * count[2])
}

fn emit(code: &Code, blocks: &[Block], order: &[u32], registers: &mut u32) -> Program {
    let ranges = live_ranges(code, blocks, order);
    let (offsets, mut bytes, used) = allocate(code, &ranges);
    *registers = used;
    let mut program = Program { smallest_shared: 16, ..Program::default() };
    let mut constant_offset = vec![u32::MAX; code.constants.len()];
    let mut offset = |value: Value, program: &mut Program| {
        if value & CONSTANT == 0 {
            return offsets[value as usize];
        }
        let index = (value & !CONSTANT) as usize;
        if constant_offset[index] == u32::MAX {
            let constant = code.constants[index];
            constant_offset[index] = bytes;
            program.constants.push((bytes, constant));
            bytes += match constant {
                Constant::Pred(_) => 64,
                Constant::B32(_)
                | Constant::Shared(_, _, false)
                | Constant::Local(_, false)
                | Constant::Param(_, false) => 128,
                _ => 256,
            };
        }
        constant_offset[index]
    };
    let mut start = vec![u32::MAX; blocks.len()];
    let mut targets: Vec<(usize, u32, u32)> = vec![];
    for (at, &index) in order.iter().enumerate() {
        let block = &blocks[index as usize];
        start[index as usize] = program.steps.len() as u32;
        let mut cost = BlockCost::default();
        let first_step = program.steps.len();
        for i in block.ins.iter().copied() {
            let ins = &code.ins[i as usize];
            let FlatOp::Op(op) = ins.op else { unreachable!("control flow ends a block") };
            let guard = ins.guard.map_or(NO_GUARD, |(register, _)| offset(register, &mut program));
            let negate = ins.guard.is_some_and(|(_, negate)| negate);
            count_cost(&mut cost, &op, guard != NO_GUARD);
            let first = program.operands.len() as u32;
            for k in 0..ins.arity as usize {
                let at = offset(code.pool[ins.first as usize + k], &mut program);
                program.operands.push(at);
            }
            let source = program.sources.len() as u32;
            program.sources.push(ins.source);
            program.fences |= matches!(op, Op::Fence(_));
            program.atomics |= matches!(op, Op::Atom { access, .. } if reaches_shared(&access));
            if matches!(op, Op::Special { register: Special::ReservedShared(_), .. }) {
                program.reserved_shared = RESERVED_SHARED;
            }
            program.copies |= matches!(op, Op::CpAsync { .. });
            program.smallest_shared = program.smallest_shared.min(shared_bytes(&op).unwrap_or(16));
            if guard == NO_GUARD
                && program.steps.len() > first_step
                && let Some(Step { op: Op::Run(last) | Op::Mma(last, _), guard: NO_GUARD, count, .. }) =
                    program.steps.last_mut()
                && let Op::Run(form) | Op::Mma(form, _) = op
                && std::ptr::eq(*last, form)
            {
                *count += 1;
                continue;
            }
            program.steps.push(Step { op, guard, negate, arity: ins.arity, first, count: 1, source, block: at as u32 });
        }
        let mut step = Step {
            op: Op::Jump(0),
            guard: NO_GUARD,
            negate: false,
            arity: 0,
            first: program.operands.len() as u32,
            count: 1,
            source: program.sources.len() as u32,
            block: at as u32,
        };
        let follow = block.next.last().copied().unwrap_or(0);
        let end = match block.end {
            End::Fall => None,
            End::Goto(i) | End::Branch(i) | End::Table(i) | End::Call(i) | End::Exit(i) => Some(&code.ins[i as usize]),
        };
        if let Some(ins) = end {
            step.guard = ins.guard.map_or(NO_GUARD, |(register, _)| offset(register, &mut program));
            step.negate = ins.guard.is_some_and(|(_, negate)| negate);
            step.arity = ins.arity;
            for k in 0..ins.arity as usize {
                let at = offset(code.pool[ins.first as usize + k], &mut program);
                program.operands.push(at);
            }
            cost.class[4] += 1;
            cost.instructions += 1;
        }
        program.sources.push(end.map_or(Source::default(), |ins| ins.source));
        step.op = match block.end {
            End::Fall | End::Goto(_) => Op::Jump(0),
            End::Branch(_) => Op::Branch { target: 0, fall: 0 },
            End::Table(i) => {
                let FlatOp::Table(table) = code.ins[i as usize].op else { unreachable!("the end says table") };
                let entries = code.tables[table as usize].len();
                program.tables.push(block.next[..entries].to_vec());
                Op::BranchTable { table: program.tables.len() as u32 - 1, fall: 0 }
            }
            End::Call(i) => {
                let FlatOp::Call(call) = code.ins[i as usize].op else { unreachable!("the end says call") };
                let mut site = code.calls[call as usize].clone();
                let code = site.targets.iter_mut().filter_map(|(_, code)| code.as_mut().ok());
                code.zip(&block.next).for_each(|(code, &block)| *code = block);
                program.calls.push(site);
                Op::CallTable(program.calls.len() as u32 - 1)
            }
            End::Exit(_) => Op::Exit { fall: 0 },
        };
        targets.push((program.steps.len(), block.next.first().copied().unwrap_or(0), follow));
        program.steps.push(step);
        program.costs.push(cost);
    }
    for (step, to, follow) in targets {
        match &mut program.steps[step].op {
            Op::Jump(target) => *target = start[to as usize],
            Op::Branch { target, fall } => (*target, *fall) = (start[to as usize], start[follow as usize]),
            Op::BranchTable { fall, .. } | Op::Exit { fall } => *fall = start[follow as usize],
            Op::CallTable(_) => {}
            _ => unreachable!("only control flow has targets"),
        }
    }
    for table in &mut program.tables {
        for target in table {
            *target = start[*target as usize];
        }
    }
    for (_, code) in program.calls.iter_mut().flat_map(|call| &mut call.targets) {
        if let Ok(code) = code {
            *code = start[*code as usize];
        }
    }
    for step in &mut program.steps {
        if let Op::Mma(form, plan) = &mut step.op
            && let Some(made) =
                form.plan(&program.operands[step.first as usize..][..step.arity as usize * step.count as usize])
        {
            *plan = program.plans.len() as u32;
            program.plans.push(made);
        }
    }
    program.file_bytes = bytes.next_multiple_of(64);
    program
}

fn reaches_shared(access: &Access) -> bool {
    matches!(access.space, Space::Shared | Space::Generic)
}

/// Smallest access of an operation that may reach shared memory, in bytes.
fn shared_bytes(op: &Op) -> Option<u32> {
    match op {
        Op::Load(access) | Op::Store(access) | Op::Atom { access, .. } if reaches_shared(access) => {
            Some(u32::from(access.bytes) * u32::from(access.elements))
        }
        Op::WmmaLoad { fragment, access, .. } | Op::WmmaStore { fragment, access, .. } if reaches_shared(access) => {
            Some(fragment.element_bytes)
        }
        Op::CpAsync { bytes, .. } => Some(u32::from(*bytes)),
        Op::Mbarrier { .. } => Some(8),
        _ => None,
    }
}

fn count_cost(cost: &mut BlockCost, op: &Op, guarded: bool) {
    let class = match op {
        Op::Run(form) | Op::Mma(form, _) => {
            if let Some((ty, flops)) = form.flops
                && !guarded
            {
                let ty = match ty {
                    FlopType::F16 => 0,
                    FlopType::Bf16 => 1,
                    FlopType::Tf32 => 2,
                    FlopType::F32 => 3,
                    FlopType::F64 => 4,
                };
                match form.class {
                    Class::Mma => cost.warp_flops[ty] += flops,
                    _ => cost.flops[ty] += flops,
                }
            }
            match form.class {
                Class::Mma => 0,
                Class::Fma => 1,
                Class::Arithmetic => 2,
                Class::Special => 3,
            }
        }
        Op::Special { .. } | Op::IsSpace(_) | Op::ActiveMask | Op::MovMatrix => 2,
        Op::Load(_)
        | Op::Store(_)
        | Op::Atom { .. }
        | Op::CpAsync { .. }
        | Op::LdMatrix { .. }
        | Op::WmmaLoad { .. }
        | Op::WmmaStore { .. } => {
            cost.instructions += 1;
            return;
        }
        _ => 4,
    };
    cost.class[class] += 1;
    cost.instructions += 1;
}
