import subprocess,sys
def fmt(src):
    r=subprocess.run(["ruff","format","--line-length","150","--config","lint.select=[]","-"],input=src,capture_output=True,text=True)
    return r.stdout if r.returncode==0 else src
for n in ("16","17","18","19","22"):
    out=[]; cur=None
    lines=open(f"/work/scratch/cir/{n}.txt").read().split("\n")
    cells=[]; 
    for l in lines:
        if l.startswith("# %%"): cells.append([l,[]])
        elif cells: cells[-1][1].append(l)
    for head,body in cells:
        src="\n".join(body)
        if "md" not in head and any(len(l)>150 for l in body):
            lead="\n".join(l for l in body if l.startswith("#|")); rest="\n".join(l for l in body if not l.startswith("#|"))
            src=(lead+"\n" if lead else "")+fmt(rest).rstrip()+"\n"
        out.append(head+"\n"+src)
    open(f"/work/scratch/cir/{n}.txt","w").write("\n".join(out))
